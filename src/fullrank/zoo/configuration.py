"""`TransformerConfig`: every option of the reference transformer, in the words of `fullrank.Architecture`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fullrank.errors import ModelError
from fullrank.zoo.options import choice, number, refuse, switch, whole

__all__ = ["Activation", "Norm", "Placement", "TransformerConfig"]

Kind = Literal["encoder", "decoder", "vision"]
Norm = Literal["layernorm", "rmsnorm", "batchnorm", "none"]
Placement = Literal["pre", "post", "peri", "res-post", "none"]
Mask = Literal["full", "causal"]
Attention = Literal["fused", "explicit"]
Positions = Literal["learned", "sinusoidal", "rotary", "none"]
Activation = Literal["identity", "relu", "gelu", "silu", "tanh"]
Pooling = Literal["mean", "first", "last"]

_CHOICES: dict[str, Any] = {
    "kind": Kind,
    "norm": Norm,
    "placement": Placement,
    "mask": Mask,
    "attention": Attention,
    "positions": Positions,
    "activation": Activation,
    "pooling": Pooling,
}
_WHOLE = {"depth": 1, "width": 1, "heads": 1, "key_value_heads": 1, "mlp_width": 0, "vocabulary": 2, "context": 2}
_WHOLE |= {"window": 1, "classes": 0, "image": 1, "patch": 1, "channels": 1}
_SWITCHES = ("final_norm", "gated", "parallel", "qk_norm", "biases", "class_token", "tie_embeddings")
_STDS = ("weight_std", "qk_std", "value_std", "output_std", "up_std", "down_std", "head_std", "embedding_std")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    r"""What a `Transformer` is made of.

    With $s$ the skip, $b$ the branch and $N$ the norm, a block is by `placement`

    - `pre`: $X \leftarrow sX + b\,f(NX)$, and `peri`: $X \leftarrow sX + b\,N'f(NX)$;
    - `post`: $X \leftarrow N(sX + b\,f(X))$, and `res-post`: $X \leftarrow sX + b\,N'f(X)$;
    - `none`: $X \leftarrow sX + b\,f(X)$,

    once with $f$ attention and once with $f$ the MLP.

    Attributes:
        kind: `decoder` predicts the next token, `encoder` every token, `vision` reads images.
        depth: blocks.
        width: of the stream.
        heads: of queries.
        key_value_heads: of keys and values; by default `heads`.
        mlp_width: hidden units; by default `4 * width`; 0 for no MLP.
        activation: of the MLP.
        gated: whether the MLP is $W_{down}(\varphi(W_{gate}x) \odot W_{up}x)$.
        norm: which; batch norm takes all tokens of a batch as its samples.
        placement: where it stands.
        final_norm: whether the head reads a norm; by default after `pre`, `peri` and `res-post`.
        parallel: whether attention and MLP read the same state.
        residual_scale: $b$.
        skip_scale: $s$.
        mask: which keys a query sees; by default `causal` for a decoder, else `full`.
        window: how many keys of the mask a query sees at most, itself in their middle where the mask is full.
        attention: `fused` calls the kernel, `explicit` makes the map by softmax.
        positions: how tokens know of theirs; images' patches are counted row by row.
        qk_norm: whether queries and keys of a head are brought to rms 1, times a gain.
        biases: whether linear maps and layer norms have them.
        dropout: probability in training, of the map and of what branches return.
        vocabulary: number of token ids.
        context: longest sequence, where positions are learned.
        classes: of a sequence, where its label is one class; 0 for one word per token. Vision: 10 by default.
        pooling: which final state the classes are read off: the mean, the first or the last real one.
        image: height and width in pixels.
        patch: height and width of a patch.
        channels: of an image.
        class_token: whether a learned token stands before the patches.
        tie_embeddings: whether the head's weight is the embedding.
        weight_std: standard deviation of the entries of all matrices; by default 1/√(inputs) of each.
        qk_std: multiplies that of W_Q and W_K, as `value_std`, `output_std`, `up_std` (with the gate), `down_std` and
            `head_std` do for theirs.
        value_std: of W_V.
        output_std: of W_O.
        up_std: of the MLP's first weights.
        down_std: of its last.
        head_std: of the head; unused where it is tied.
        embedding_std: standard deviation of the entries of embeddings, learned positions and the class token.
    """

    kind: Kind = "encoder"
    depth: int = 4
    width: int = 64
    heads: int = 4
    key_value_heads: int | None = None
    mlp_width: int | None = None
    activation: Activation = "gelu"
    gated: bool = False
    norm: Norm = "layernorm"
    placement: Placement = "pre"
    final_norm: bool | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    mask: Mask | None = None
    window: int | None = None
    attention: Attention = "fused"
    positions: Positions = "learned"
    qk_norm: bool = False
    biases: bool = True
    dropout: float = 0.0
    vocabulary: int = 256
    context: int = 128
    classes: int | None = None
    pooling: Pooling = "mean"
    image: int = 32
    patch: int = 4
    channels: int = 3
    class_token: bool = False
    tie_embeddings: bool = False
    weight_std: float | None = None
    qk_std: float = 1.0
    value_std: float = 1.0
    output_std: float = 1.0
    up_std: float = 1.0
    down_std: float = 1.0
    head_std: float = 1.0
    embedding_std: float = 1.0

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            if name != "mask" or self.mask is not None:
                choice(name, getattr(self, name), get_args(options))
        vision, usual = self.kind == "vision", self.placement in ("pre", "peri", "res-post")
        own = object.__setattr__
        for name, value in {
            "key_value_heads": self.heads,
            "mlp_width": 4 * self.width,
            "final_norm": usual and self.norm != "none",
            "mask": "causal" if self.kind == "decoder" else "full",
            "classes": 10 if vision else 0,
        }.items():
            if getattr(self, name) is None:
                own(self, name, value)
        for name, least in _WHOLE.items():
            if name != "window" or self.window is not None:
                whole(name, getattr(self, name), least)
        for name in _SWITCHES:
            switch(name, getattr(self, name))
        for name in _STDS:
            if name != "weight_std" or self.weight_std is not None:
                number(name, getattr(self, name), 0.0)
        number("residual_scale", self.residual_scale)
        number("skip_scale", self.skip_scale)
        number("dropout", self.dropout, 0.0, 1.0)
        _together(self)

    def with_(self, **values: Any) -> TransformerConfig:
        """The same with other values; what was derived from `width`, `heads`, `kind` or `placement` follows them.

        Args:
            **values: of fields.

        Returns:
            Another configuration.

        Raises:
            ModelError: for a name that is no field, or values that do not go together.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ModelError(f"{unknown[0]!r} is no option of a transformer: it has {', '.join(names)}.")
        plain = TransformerConfig(kind=self.kind, placement=self.placement, norm=self.norm, width=self.width)
        plain = plain if self.heads == plain.heads else dataclasses.replace(plain, key_value_heads=self.heads)
        derived = ("key_value_heads", "mlp_width", "final_norm", "mask", "classes")
        usual = {name: None for name in derived if getattr(self, name) == getattr(plain, name)}
        return dataclasses.replace(self, **usual | values)

    @property
    def head_width(self) -> int:
        """Of a query, a key or a value."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """The longest sequence that blocks see: patches and the class token, or `context`."""
        return (self.image // self.patch) ** 2 + self.class_token if self.kind == "vision" else self.context


def _together(one: TransformerConfig) -> None:
    assert one.key_value_heads is not None
    if one.width % one.heads:
        refuse("heads", one.heads, f"a divisor of width={one.width}")
    if one.heads % one.key_value_heads:
        refuse("key_value_heads", one.key_value_heads, f"a divisor of heads={one.heads}")
    if one.norm == "none" and (one.placement != "none" or one.final_norm):
        raise ModelError(f"norm='none' leaves nothing for placement={one.placement!r} or final_norm={one.final_norm}.")
    if one.positions == "rotary" and one.head_width % 2:
        refuse("positions", one.positions, f"another than rotary where heads are {one.head_width} wide: pairs turn")
    if one.positions == "sinusoidal" and one.width % 2:
        refuse("positions", one.positions, f"another than sinusoidal for width={one.width}: pairs turn")
    if one.window is not None and one.mask == "full" and one.window % 2 == 0:
        refuse("window", one.window, "odd under a full mask: as many keys before a query as after it")
    if one.mlp_width == 0 and one.parallel:
        refuse("parallel", one.parallel, "False without an MLP (mlp_width=0)")
    if one.kind == "vision":
        if one.image % one.patch:
            refuse("patch", one.patch, f"a divisor of image={one.image}")
        if not one.classes:
            refuse("classes", one.classes, "1 or more for vision")
    elif one.class_token:
        refuse("class_token", one.class_token, "False for text: pooling='first' reads its first token")
    if one.tie_embeddings and one.classes:
        refuse("tie_embeddings", one.tie_embeddings, f"False where the head tells classes ({one.classes}), not words")
