"""What is common to the tokens of a sequence: their mean, or the mean of those so far."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sequence_means"]


def sequence_means(X: Tensor, real: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Every real token of X replaced by the mean of its sequence's real tokens; padded tokens stay as they are.

    Where attention is causal the mean at token t is that of the real tokens s ≤ t: nothing is seen before its time.

    Args:
        X: (sequences, …, tokens, width).
        real: (sequences, tokens), which tokens are real; None for all.
        causal: whether the mean runs along with the tokens.

    Returns:
        A tensor like X; sums are taken in float32 at least.
    """
    sequences, tokens = X.shape[0], X.shape[-2]
    Y = X if X.dtype == torch.float64 else X.float()
    if real is None:
        real = torch.ones(1, tokens, dtype=torch.bool, device=X.device).expand(sequences, -1)
    keep = real.reshape(sequences, *([1] * (X.ndim - 3)), tokens, 1)
    Y = torch.where(keep, Y, 0)  # whatever stands at padded tokens, NaN included
    n = keep.to(Y.dtype)
    if causal:
        total, count = Y.cumsum(-2), n.cumsum(-2)
    else:
        total, count = Y.sum(-2, keepdim=True), n.sum(-2, keepdim=True)
    return torch.where(keep, (total / count.clamp(min=1)).to(X.dtype), X)
