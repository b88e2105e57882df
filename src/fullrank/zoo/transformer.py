"""The reference transformer: an encoder, a decoder or a vision model of plain options.

From top to bottom: the model, its block, its MLP, what stands before and after the blocks. Attention is in
`attention.py`, masks in `visible.py`, positions in `positions.py`, options in `configuration.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.errors import BatchError
from fullrank.zoo.attention import Attention
from fullrank.zoo.branch import Branch, scaled
from fullrank.zoo.configuration import TransformerConfig
from fullrank.zoo.inputs import require_fitting_mask, the_one_given, token_vectors_or_ids
from fullrank.zoo.norms import norm_of
from fullrank.zoo.output import Prediction, loss_of
from fullrank.zoo.positions import sinusoids
from fullrank.zoo.visible import visible_keys
from fullrank.zoo.weights import draw, draw_linear

__all__ = ["MLP", "Block", "Transformer"]

_ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Transformer(nn.Module):
    """Embedding, `config.depth` blocks, a final norm, a head.

    Args:
        config: its options; by default a small pre-norm encoder.
        seed: of the weights, which are drawn without touching anybody's random numbers.
    """

    def __init__(self, config: TransformerConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        config = TransformerConfig() if config is None else config
        self.config = config
        self.main_input_name = "pixel_values" if config.kind == "vision" else "input_ids"
        device = torch.get_default_device()
        with torch.device("meta"):  # where constructors of torch draw nothing
            self.embedding = Patches(config) if config.kind == "vision" else Words(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.final_norm = _norm(config) if config.final_norm else None
            self.head = nn.Linear(config.width, config.classes or config.vocabulary, bias=config.biases)
        self.to_empty(device=device)
        if config.tie_embeddings and isinstance(self.embedding, Words):
            self.head.weight = self.embedding.words.weight
        self.reset_parameters(torch.Generator().manual_seed(seed))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew; gains become 1 and biases 0.

        Args:
            generator: on the CPU; by default torch's own, as for every module of torch.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d):
                module.reset_parameters()
        self.embedding.reset_parameters(generator)
        for block in self.blocks:
            for part in block.modules():
                if isinstance(part, Attention | MLP):
                    part.reset_parameters(generator)
        tied = self.config.tie_embeddings
        if tied and self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        elif not tied:
            draw_linear(self.head, self.config.head_std, self.config.weight_std, generator)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Prediction:
        """Logits of every token, or of the classes of every sequence.

        Args:
            input_ids: (sequences, tokens) of ids.
            attention_mask: (sequences, tokens), 1 for real tokens and 0 for padding.
            labels: as many as there are logits, with -100 for those that are left out; of a decoder the tokens
                themselves, of which every one is to be told from those before it.
            pixel_values: (sequences, channels, height, width) of images.
            inputs_embeds: (sequences, tokens, width) in place of `input_ids`.

        Returns:
            Logits, and with labels the loss.

        Raises:
            BatchError: for inputs that do not fit the model.
        """
        config = self.config
        given = the_one_given(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds)
        if (given == "pixel_values") != (config.kind == "vision"):
            raise BatchError(
                f"{given} was given to a model of kind={config.kind!r}, which reads {self.main_input_name}."
            )
        x = next(one for one in (input_ids, pixel_values, inputs_embeds) if one is not None)
        X = self.embedding(x)
        require_fitting_mask(attention_mask, *X.shape[:2])
        visible = self.visible(X, attention_mask)
        for block in self.blocks:
            X = block(X, visible)
        if self.final_norm is not None:
            X = self.final_norm(X)
        logits = self.head(self._pooled(X, attention_mask) if config.classes else X)
        words = config.kind == "decoder" and not config.classes
        return Prediction(logits, loss_of(logits, labels, shifted=words))

    def visible(self, X: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Which keys a query sees; None where all, or all before it, are seen, which the kernel needs no tensor for."""
        config = self.config
        if attention_mask is None and config.window is None:
            return None
        causal = config.mask == "causal"
        return visible_keys(X.shape[1], causal=causal, window=config.window, real=attention_mask, device=X.device)

    def _pooled(self, X: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(sequences, width) of the final states of real tokens."""
        real = X.new_ones(X.shape[:2]) if attention_mask is None else attention_mask.to(X.dtype)
        match self.config.pooling:
            case "mean":
                return (real[..., None] * X).sum(1) / real.sum(1, keepdim=True)
            case "first":
                at = real.argmax(1)
            case "last":
                at = X.shape[1] - 1 - real.flip(1).argmax(1)
        return X[torch.arange(len(X), device=X.device), at]


class Block(nn.Module):
    """Attention and MLP, each a branch that is added to the stream (see `TransformerConfig`).

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = _branch(Attention(config), config)
        self.mlp = _branch(MLP(config), config) if config.mlp_width else None
        post = config.placement == "post"
        self.after_attention = _norm(config) if post else None
        self.after_mlp = _norm(config) if post and self.mlp is not None and not config.parallel else None

    def forward(self, X: Tensor, visible: Tensor | None = None) -> Tensor:
        """The state after the block.

        Args:
            X: (sequences, tokens, width).
            visible: which keys a query sees.

        Returns:
            (sequences, tokens, width).
        """
        s, b = self.config.skip_scale, self.config.residual_scale
        if self.mlp is not None and self.config.parallel:
            X = scaled(s, X) + (scaled(b, self.attention(X, visible)) + scaled(b, self.mlp(X)))
            return X if self.after_attention is None else self.after_attention(X)
        X = scaled(s, X) + scaled(b, self.attention(X, visible))
        X = X if self.after_attention is None else self.after_attention(X)
        if self.mlp is not None:
            X = scaled(s, X) + scaled(b, self.mlp(X))
            X = X if self.after_mlp is None else self.after_mlp(X)
        return X


class MLP(nn.Module):
    """W_down φ(W_up x), or with a gate W_down (φ(W_gate x) ⊙ W_up x).

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        assert config.mlp_width is not None
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.biases)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=config.biases) if config.gated else None
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.biases)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew."""
        draw_linear(self.up, self.config.up_std, self.config.weight_std, generator)
        if self.gate is not None:
            draw_linear(self.gate, self.config.up_std, self.config.weight_std, generator)
        draw_linear(self.down, self.config.down_std, self.config.weight_std, generator)

    def forward(self, X: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        phi = _ACTIVATIONS[self.config.activation]
        h = phi(self.up(X)) if self.gate is None else phi(self.gate(X)) * self.up(X)
        out: Tensor = self.dropout(self.down(h))
        return out


class Words(nn.Module):
    """Vectors of token ids, and of positions where these are added.

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.tokens, config.width) if config.positions == "learned" else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every vector anew."""
        draw(self.words.weight, self.config.embedding_std, generator)
        if self.positions is not None:
            draw(self.positions.weight, self.config.embedding_std, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, tokens) of ids, or (sequences, tokens, width), to (sequences, tokens, width)."""
        config = self.config
        longest = config.context if config.positions == "learned" else None
        token_vectors_or_ids(x, "inputs_embeds" if x.is_floating_point() else "input_ids", config.width, longest)
        return _placed(x if x.is_floating_point() else self.words(x), self.positions, config)


class Patches(nn.Module):
    """Linear maps of the patches of an image, row by row, after the class token where there is one.

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, config.patch, bias=config.biases)
        self.class_token = nn.Parameter(torch.zeros(config.width)) if config.class_token else None
        self.positions = nn.Embedding(config.tokens, config.width) if config.positions == "learned" else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew."""
        draw_linear(self.patches, 1.0, self.config.weight_std, generator)
        if self.class_token is not None:
            draw(self.class_token, self.config.embedding_std, generator)
        if self.positions is not None:
            draw(self.positions.weight, self.config.embedding_std, generator)

    def forward(self, images: Tensor) -> Tensor:
        """(sequences, channels, height, width) to (sequences, tokens, width)."""
        config = self.config
        size, channels = config.image, config.channels
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, size, size):
            wanted = f"(sequences, {channels}, {size}, {size})"
            raise BatchError(f"pixel_values has the shape {tuple(images.shape)}; expected {wanted}.")
        X = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            X = torch.cat([self.class_token.expand(len(X), 1, -1), X], 1)
        return _placed(X, self.positions, config)


def _placed(X: Tensor, positions: nn.Embedding | None, config: TransformerConfig) -> Tensor:
    if positions is not None:
        X = X + positions(torch.arange(X.shape[1], device=X.device))
    return X + sinusoids(X.shape[1], config.width, like=X) if config.positions == "sinusoidal" else X


def _norm(config: TransformerConfig) -> nn.Module:
    return norm_of(config.norm, config.width, biases=config.biases)


def _branch(inner: nn.Module, config: TransformerConfig) -> Branch:
    before = _norm(config) if config.placement in ("pre", "peri") else None
    after = _norm(config) if config.placement in ("peri", "res-post") else None
    return Branch(inner, before=before, after=after)
