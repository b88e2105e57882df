"""Attention calls as edits see them, made of tensors, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call, Place

PLACE = Place("decoder", 1, "self", "attention")


def shown(query: Tensor, key: Tensor, value: Tensor | None = None, **options: object) -> Call:
    """One of a fused kernel."""
    return Call(PLACE, "scaled_dot_product_attention", key if value is None else value, query, key, **options)


def explicit(logits: Tensor, value: Tensor | None = None) -> Call:
    """One of a model that softmaxes by itself."""
    value = torch.zeros(*logits.shape[:2], logits.shape[-1], 1) if value is None else value
    return Call(PLACE, "softmax", value, logits=logits, weights=torch.softmax(logits, -1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1) in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
