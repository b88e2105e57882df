"""Tokens that have become the same number, and directions that the input did not have."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import real_tokens

__all__ = ["distinct_at_dtype", "row_space", "span_novelty"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def distinct_at_dtype(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Share of the pairs of tokens whose vectors still differ in the dtype that X came in.

    1 − Σ_g n_g (n_g − 1) / (T (T − 1)); the n_g are the sizes of the groups of exactly equal tokens. Range [0, 1];
    null 1; 0 when all tokens are one to the last bit. Hand over the state in the dtype of the run. Invariant to
    token order. O(T d log T): rows are sorted, no pairs.
    """
    *batch, tokens, width = X.shape
    bits = (X.detach() + 0.0).view(_BITS[X.element_size()])  # + 0.0: the two zeros are one number
    rows = bits.reshape(math.prod(batch), tokens, width)
    reals = None if mask is None else mask.reshape(math.prod(batch), tokens)
    shares = [_distinct(rows[b] if reals is None else rows[b][reals[b]]) for b in range(rows.shape[0])]
    found = torch.stack(shares) if shares else torch.empty(0, dtype=torch.float64, device=X.device)
    return found.reshape(batch)


def _distinct(rows: Tensor) -> Tensor:
    T = rows.shape[0]
    if T < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=rows.device)
    _, sizes = torch.unique(rows, dim=0, return_counts=True)
    same: Tensor = (sizes * (sizes - 1)).sum().double()
    return 1 - same / (T * (T - 1))


def row_space(
    X_0: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch basis width"]:
    """Orthonormal rows that span the rows of X_0; directions below its numerical rank are zero rows. O(T² d), float64.

    The dear half of `span_novelty`: build it once for the input, use it at every layer.
    """
    X, real = real_tokens(X_0, mask)
    eps = torch.finfo(X.dtype).eps  # of the arithmetic: the rows span what they span, however coarse their dtype
    X = X.double()
    finite = X.isfinite().all(-1).all(-1)
    _, sigma, Vh = torch.linalg.svd(torch.where(finite[..., None, None], X, 0), full_matrices=False)
    size = real.sum(-1).clamp(min=X.shape[-1])
    kept = sigma > sigma[..., :1] * size[..., None] * eps
    Vh = torch.where(kept[..., None], Vh, 0)
    return torch.where(finite[..., None, None], Vh, torch.nan)


def span_novelty(
    X: Float[Tensor, "*batch tokens width"],
    X_0: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
    *,
    basis: Float[Tensor, "*batch basis width"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Share of ‖X_ℓ‖² outside the row space of X_0: ‖X_ℓ (I − QᵀQ)‖_F² / ‖X_ℓ‖_F², rows of Q an orthonormal basis.

    What attention with W_OV ∝ I can never produce, and head mixing, W_OV and MLPs do. Range [0, 1]; null 1 − T/d
    for unrelated states; NaN where T ≥ d, because X_0 may then span everything. Invariant to token order, rotation
    (of both) and scale. O(T² d), of which all but O(T d rank) is the basis.

    Args:
        X: states after a block.
        X_0: states before the first block.
        mask: which tokens are real.
        basis: `row_space(X_0, mask)` where it is at hand.

    Returns:
        The share, one per sequence.
    """
    width = X.shape[-1]
    X, real = real_tokens(X, mask)
    if basis is None:
        basis = row_space(X_0, mask)
    X = X.double()
    outside = X - (X @ basis.mT) @ basis
    share = (outside.square().sum((-2, -1)) / X.square().sum((-2, -1))).clamp(max=1)
    return torch.where(real.sum(-1) < width, share, torch.nan)
