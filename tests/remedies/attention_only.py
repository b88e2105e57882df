"""Stacks of attention alone, as the cards simulate them: maps of queries and keys, or drawn anew for every head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """X ← skip · X + Σ_h A_h X W_V W_O, normalised before or after or not.

    Args:
        tokens: how many.
        width: of the stream.
        heads: how many.
        norm: "none", "pre" or "post".
        skip: factor of the stream.
        std: of queries' and keys' weights, times √width; None for maps that do not depend on the stream.
        drawn: logits of such maps, (heads, tokens, tokens).
        generator: of the weights.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        heads: int,
        norm: str,
        skip: float,
        std: float | None,
        drawn: Tensor | None,
        value: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.heads, self.norm, self.skip = heads, norm, skip
        self.num_heads = heads

        def weight(std: float) -> nn.Parameter:
            W = torch.randn(width, width, generator=generator, dtype=torch.float64)
            return nn.Parameter(std * W / math.sqrt(width))

        if drawn is None:
            assert std is not None
            self.query, self.key = weight(std), weight(std)
        self.value = weight(1.0) if value is None else nn.Parameter(value)
        self.output = nn.Linear(width, width, bias=False, dtype=torch.float64)
        self.output.weight = weight(1.0) if value is None else nn.Parameter(torch.eye(width, dtype=torch.float64))
        self.register_buffer("logits", drawn)

    def forward(self, X: Tensor) -> Tensor:
        Z = functional.layer_norm(X, X.shape[-1:]) if self.norm == "pre" else X
        v = self._split(Z @ self.value)
        if self.logits is None:
            q, k = self._split(Z @ self.query), self._split(Z @ self.key)
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            A = self.logits.expand(X.shape[0], *self.logits.shape).softmax(-1)
            y = A @ v
        Y = self.output(y.transpose(1, 2).reshape(X.shape))
        Y = Y if self.skip == 0 else self.skip * X + Y
        return functional.layer_norm(Y, Y.shape[-1:]) if self.norm == "post" else Y

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class AttentionOnly(nn.Module):
    """A stack of such blocks.

    Args:
        tokens: how many.
        width: of the stream.
        heads: how many.
        layers: how many.
        seed: of all that is drawn.
        norm: none, pre or post.
        skip: factor of the stream; 0 for no skip.
        std: of queries' and keys' weights, times √width.
        drawn: std of logits that do not depend on the stream; None for queries and keys.
        causal: whether such maps are.
        value_std: of the entries of one value matrix, without an output matrix; None for two of variance 1/width.
        isometric: whether the start has orthonormal rows; Gaussian ones otherwise.

    Attributes:
        start: (1, tokens, width), Gaussian tokens, or isometric ones.
    """

    def __init__(
        self,
        *,
        tokens: int,
        width: int,
        heads: int,
        layers: int,
        seed: int,
        norm: str = "none",
        skip: float = 0.0,
        std: float = 1.0,
        drawn: float | None = None,
        causal: bool = False,
        value_std: float | None = None,
        isometric: bool = False,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        def logits() -> Tensor | None:
            if drawn is None:
                return None
            s = drawn * normal(heads, tokens, tokens)
            return s.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf) if causal else s

        start = normal(tokens, width)
        self.start = (torch.linalg.qr(start).Q if isometric else start)[None]
        self.blocks = nn.ModuleList(
            Block(
                tokens,
                width,
                heads,
                norm,
                skip,
                None if drawn is not None else std,
                logits(),
                None if value_std is None else value_std * normal(width, width),
                g,
            )
            for _ in range(layers)
        )

    def forward(self, X: Tensor) -> Tensor:
        for block in self.blocks:
            X = block(X)
        return X

    def states(self) -> Sequence[Tensor]:
        """The stream after every block, (tokens, width)."""
        X, states = self.start, []
        with torch.no_grad():
            for block in self.blocks:
                X = block(X)
                states.append(X[0])
        return states


def residual(X: Tensor) -> float:
    """‖X − 1x̄ᵀ‖/‖X‖."""
    return float((X - X.mean(-2, keepdim=True)).norm() / X.norm())
