"""Gaps from orthogonality of a set of vectors: the samples of a batch, or the tokens of a sequence.

X ∈ ℝ^{n×d} holds n vectors. Both gaps are of the Gram matrix XXᵀ.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.spectrum import singular_values

__all__ = ["isometry_gap", "orthogonality_gap"]


def orthogonality_gap(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """V(X) = ‖XXᵀ/‖X‖_F² − I/n‖_F (Daneshmand, Joudaki and Bach 2021).

    Range [0, √(1 − 1/n)]: 0 for orthogonal vectors of equal length, the upper end when all are parallel; null ≈
    1/√d. Invariant to order, rotation and scale. NaN for a zero matrix. O(n d min(n, d)).
    """
    sigma = singular_values(X, mask)
    n = _count(X, mask)
    share = (sigma / sigma[..., :1]).square()
    share = share / share.sum(-1, keepdim=True)
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    off = torch.where(index < n[..., None], share - 1 / n[..., None], 0).square().sum(-1)
    missing = (n - sigma.shape[-1]).clamp(min=0)  # eigenvalues of the Gram matrix that are zero for want of channels
    return (off + missing / n.square()).sqrt()


def isometry_gap(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """−log of the isometry of the Gram matrix: log mean_i λ_i − mean_i log λ_i, λ = eig(XXᵀ) (Joudaki et al. 2023).

    Range [0, ∞]: 0 for orthogonal vectors of equal length, ∞ when they are dependent (so always for n > d; where a
    mean token was removed, too). Invariant to order, rotation and scale. True singular values in float64, because
    the logarithm reads the smallest. O(n d min(n, d)).
    """
    sigma = singular_values(X.double(), mask)
    n = _count(X, mask)
    log_sigma = (sigma / sigma[..., :1]).log()
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    kept = index < n[..., None]
    mean_energy = torch.where(kept, (2 * log_sigma).exp(), 0).sum(-1) / n
    mean_log = torch.where(kept, 2 * log_sigma, 0).sum(-1) / n
    gap = (mean_energy.log() - mean_log).clamp(min=0)
    return torch.where((n > sigma.shape[-1]) & ~gap.isnan(), torch.inf, gap)


def _count(X: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full(X.shape[:-2], X.shape[-2], dtype=torch.float64, device=X.device)
    return mask.sum(-1).double()
