"""`Architecture`: everything that signal propagation at initialisation depends on, as one frozen record."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from fullrank.architecture.consistency import require_consistent
from fullrank.architecture.sentence import sentence
from fullrank.architecture.shorthands import SHORTHANDS, field_names
from fullrank.errors import ArchitectureError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Activation", "Architecture", "Mask", "Norm", "Placement", "Positions"]

Activation = Literal["identity", "relu", "gelu", "silu", "tanh"]
Norm = Literal["layernorm", "rmsnorm", "batchnorm", "none"]
Placement = Literal["pre", "post", "peri", "res-post", "none"]
Mask = Literal["full", "causal"]
Positions = Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    r"""A stack of `depth` equal blocks, each of attention and an MLP, as theories of its initialisation see it.

    With $s_a, s_m$ the skips, $b_a, b_m$ the branches and $\mathrm{LN}$ the norm, a block is

    - `pre`: $X \leftarrow s_a X + b_a\,\mathrm{Att}(\mathrm{LN}X)$;
    - `post`: $X \leftarrow \mathrm{LN}(s_a X + b_a\,\mathrm{Att}X)$;
    - `peri`: $X \leftarrow s_a X + b_a\,\mathrm{LN}\,\mathrm{Att}(\mathrm{LN}X)$;
    - `res-post`: $X \leftarrow s_a X + b_a\,\mathrm{LN}\,\mathrm{Att}X$;
    - `none`: $X \leftarrow s_a X + b_a\,\mathrm{Att}X$,

    followed by the same with the MLP, $s_m$ and $b_m$.

    Weights are independent with mean 0; a gated MLP is $W_{down}(\varphi(W_{gate}x) \odot W_{up}x)$.

    Attributes:
        depth: blocks.
        width: of the stream.
        heads: of queries.
        key_value_heads: of keys and values; by default `heads`.
        head_width: of a query, key or value; by default `width // heads`.
        mlp_width: hidden units; by default `4 * width`; 0 for no MLP.
        activation: φ of the MLP.
        gated: whether the MLP has a gate.
        norm: of what blocks read or write.
        placement: where it stands.
        parallel: whether attention and MLP read the same state and are added together.
        attention_branch: multiplies what attention adds to the stream.
        mlp_branch: multiplies what the MLP adds.
        attention_skip: multiplies the stream past attention.
        mlp_skip: multiplies the stream past the MLP.
        std_q: standard deviation of the entries of W_Q at initialisation, as for every `std_…`.
        std_k: of W_K.
        std_v: of W_V.
        std_o: of W_O.
        std_up: of the MLP's first weight (what the gate multiplies, where there is one).
        std_gate: of the gate's weight; unused without one.
        std_down: of the MLP's last weight.
        std_bias_attention: of the entries of the bias that attention adds to its branch, W_O's and W_V's together.
        std_bias_mlp: of the entries of the MLP's last bias.
        std_bias_up: of the entries of the MLP's first bias.
        qk_norm: whether queries and keys of a head are brought to rms 1.
        logit_scale: multiplies q·k; by default 1/√head_width.
        softcap: c of c·tanh(s/c); None for none.
        dropout: probability in training; theories speak of evaluation.
        mask: which keys a query sees.
        window: how many keys of the mask a query sees at most; None for all.
        positions: how attention knows of positions.
        context: tokens in a sequence.
        correlation: ρ₀, mean cosine between different tokens of what the first block is given.
        correlation_stderr: of ρ₀, where it was measured.
        input_rms: root mean square of what the first block is given.
        stack: name of the stack, as in the rows of `examine`.
        name: of the model, for the reader.
    """

    depth: int
    width: int
    heads: int = 1
    key_value_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    activation: Activation = "gelu"
    gated: bool = False
    norm: Norm = "layernorm"
    placement: Placement = "pre"
    parallel: bool = False
    attention_branch: float = 1.0
    mlp_branch: float = 1.0
    attention_skip: float = 1.0
    mlp_skip: float = 1.0
    std_q: float = 0.02
    std_k: float = 0.02
    std_v: float = 0.02
    std_o: float = 0.02
    std_up: float = 0.02
    std_gate: float = 0.02
    std_down: float = 0.02
    std_bias_attention: float = 0.0
    std_bias_mlp: float = 0.0
    std_bias_up: float = 0.0
    qk_norm: bool = False
    logit_scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    mask: Mask = "full"
    window: int | None = None
    positions: Positions = "learned"
    context: int = 512
    correlation: float = 0.0
    correlation_stderr: float = 0.0
    input_rms: float = 1.0
    stack: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        require_consistent(self)
        own = object.__setattr__
        own(self, "key_value_heads", self.heads if self.key_value_heads is None else self.key_value_heads)
        own(self, "head_width", self.width // self.heads if self.head_width is None else self.head_width)
        own(self, "mlp_width", 4 * self.width if self.mlp_width is None else self.mlp_width)
        own(self, "logit_scale", float(self.head_width or 1) ** -0.5 if self.logit_scale is None else self.logit_scale)
        own(self, "stack", self.stack or ("decoder" if self.mask == "causal" else "encoder"))

    def __str__(self) -> str:
        return sentence(self)

    @classmethod
    def from_config(cls, config: Any, *, context: int | None = None, seed: int = 0) -> Architecture:
        """Of any Hugging Face configuration, at its own random initialisation.

        Args:
            config: a configuration, or a SPEC that names one.
            context: tokens in a sequence; by default 512, or as many as the model takes.
            seed: of the draw whose standard deviations and token correlation are taken.

        Returns:
            The architecture.

        Raises:
            ArchitectureError: for a model without a stack of attention blocks.
        """
        from fullrank.verbs.architecture_from import architecture_from_config

        return architecture_from_config(config, context=context, seed=seed)

    @classmethod
    def from_model(cls, model: nn.Module | str, batch: Any = None, *, context: int | None = None) -> Architecture:
        """Of a model as it is: standard deviations of its weights, token correlation of a batch.

        Args:
            model: a module, or a SPEC.
            batch: what it is called with, as `examine` takes it; by default one made for the model.
            context: tokens in a sequence; by default the batch's.

        Returns:
            The architecture.

        Raises:
            ArchitectureError: for a model without a stack of attention blocks.
        """
        from fullrank.verbs.architecture_from import architecture_from_model

        return architecture_from_model(model, batch, context=context)

    def with_(self, **values: Any) -> Architecture:
        """The same with other values, by field or by shorthand (`residual_scale`, `skip_scale`, `qk_std`, …).

        Tokens of mean cosine below 0 cannot be many: where `context` alone is given and they are too many for
        theirs, `correlation` becomes the least that there is, −1/(T − 1).

        Args:
            **values: of fields.

        Returns:
            Another architecture.

        Raises:
            ArchitectureError: for a name that is no field, or values that do not go together.
        """
        unknown = [name for name in values if name not in SHORTHANDS and name not in field_names(type(self))]
        if unknown:
            accepted = ", ".join((*SHORTHANDS, *field_names(type(self))))
            raise ArchitectureError(f"{unknown[0]!r} is no field of an architecture: it has {accepted}.")
        fields = {field: value for name, value in values.items() for field in SHORTHANDS.get(name, (name,))}
        if "heads" in values or "width" in values:  # what was derived from them follows them
            usual = self.width // self.heads
            fields.setdefault("head_width", None if self.head_width == usual else self.head_width)
            fields.setdefault("logit_scale", None if self.logit_scale == usual**-0.5 else self.logit_scale)
            fields.setdefault("mlp_width", None if self.mlp_width == 4 * self.width else self.mlp_width)
            fields.setdefault("key_value_heads", None if self.key_value_heads == self.heads else self.key_value_heads)
        if "correlation" not in fields and self.correlation < 0:
            tokens = fields.get("context", self.context)
            if tokens != self.context and isinstance(tokens, Integral) and int(tokens) > 1:
                fields["correlation"] = max(self.correlation, -1 / (int(tokens) - 1))
        return dataclasses.replace(self, **fields)

    @property
    def visible(self) -> float:
        """Keys that a late query sees: all of them, or those of the window; three quarters where the mask is causal."""
        full = float(self.context) if self.mask == "full" else 0.75 * self.context
        return full if self.window is None else min(full, float(self.window))

    @property
    def value_gain(self) -> float:
        r"""$(d\,\sigma_V^2)(H d_h\,\sigma_O^2)$: variance of what attention writes where tokens are alike, of rms 1."""
        return self.width * self.std_v**2 * self.heads * float(self.head_width or 0) * self.std_o**2

    @property
    def logit_std(self) -> float:
        r"""$\tau\sqrt{d_h}\,d\,\sigma_Q\sigma_K$ of logits of independent tokens of rms 1; τ√d_h with q, k normed."""
        scale = float(self.logit_scale or 0) * math.sqrt(float(self.head_width or 0))
        return scale if self.qk_norm else scale * self.width * self.std_q * self.std_k

    @property
    def gauge(self) -> float:
        r"""$\hat b$ = `logit_std` $/\sqrt{\log T}$ over the keys that a late query sees: transition at √2."""
        return self.logit_std / math.sqrt(math.log(max(self.visible, 2.0)))
