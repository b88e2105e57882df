"""What a model returns, document by document: its sequences apart, and which of their tokens are real."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.padding import RealTokens

__all__ = ["by_document", "real_outputs"]


def by_document(tensor: Tensor, sequences: int, anatomy: Anatomy) -> Tensor:
    """An output as (documents, tokens, width); one document where it is not known how sequences come apart."""
    layout = anatomy.stacks[-1].layout
    if tensor.ndim == 3 and layout.tokens_first and tensor.shape[0] != sequences == tensor.shape[1]:
        return tensor.transpose(0, 1)
    if tensor.shape[0] != sequences:
        return tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.ndim == 2:
        return tensor.unsqueeze(1)
    if tensor.ndim > 3 and layout.axes == "samples":
        return tensor.flatten(1).unsqueeze(1)
    if tensor.ndim > 3 and layout.axes == "channels first":
        return tensor.flatten(2).mT
    return tensor.flatten(1, -2)


def real_outputs(real: Tensor | Mapping[str, Tensor] | None, X: Tensor, anatomy: Anatomy) -> Tensor:
    """(documents, tokens), which tokens of an output count: those of the last stack that are real, else all."""
    told = RealTokens(anatomy, real).of(anatomy.stacks[-1], X.shape[0], X.shape[1], X.device)
    return torch.ones(X.shape[:2], dtype=torch.bool, device=X.device) if told is None else told
