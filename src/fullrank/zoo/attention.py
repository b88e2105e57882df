"""Multi-head attention of the reference transformer, by the kernel or by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.zoo.configuration import TransformerConfig
from fullrank.zoo.positions import rotated
from fullrank.zoo.weights import draw_linear

__all__ = ["Attention"]


class Attention(nn.Module):
    """softmax(QKᵀ/√d_h) V per head, then W_O.

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        assert config.key_value_heads is not None
        narrow = config.key_value_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=config.biases)
        self.key = nn.Linear(config.width, narrow, bias=config.biases)
        self.value = nn.Linear(config.width, narrow, bias=config.biases)
        self.output = nn.Linear(config.width, config.width, bias=config.biases)
        self.query_norm = nn.RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew."""
        config = self.config
        for linear in (self.query, self.key):
            draw_linear(linear, config.qk_std, config.weight_std, generator)
        draw_linear(self.value, config.value_std, config.weight_std, generator)
        draw_linear(self.output, config.output_std, config.weight_std, generator)

    def forward(self, X: Tensor, visible: Tensor | None = None) -> Tensor:
        """What attention adds to the stream.

        Args:
            X: (sequences, tokens, width).
            visible: which keys a query sees; None where the mask alone says it.

        Returns:
            (sequences, tokens, width).
        """
        q, k, v = self._heads(self.query(X)), self._heads(self.key(X)), self._heads(self.value(X))  # (B, h, T, d_h)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.positions == "rotary":
            q, k = rotated(q), rotated(k)
        y = self._fused(q, k, v, visible) if self.config.attention == "fused" else self._explicit(q, k, v, visible)
        out: Tensor = self.dropout(self.output(y.transpose(1, 2).reshape(X.shape)))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.config.head_width).transpose(1, 2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=visible is None and self.config.mask == "causal",
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        if k.shape[1] != q.shape[1]:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = q @ k.transpose(-1, -2) * self.config.head_width**-0.5
        if visible is not None:
            s = s.masked_fill(~visible, float("-inf"))
        elif self.config.mask == "causal":
            s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        A = functional.dropout(s.softmax(-1), self.config.dropout, self.training)
        return A @ v
