"""Orthonormal bases of blocks of long vectors, at the price of a few products.

A Householder factorisation of (T × 72) costs as much as multiplying by a small map; the Gram matrix costs a tenth. Its
weakness, that it squares the condition number, is met by float64, by scaling the columns, and by doing it twice.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gram", "orthonormalise"]

_DROP = 1e-10
"""Directions whose share of the (scaled) block's energy is below this are rounding: they are dropped."""

_SOUND = 0.1
"""Smallest pivot of the scaled Gram matrix with which one pass is enough."""

_KEPT = 1e-2
"""Share of every column's energy that the projection must have left for the same."""


def gram(Y: Float[Tensor, "*lead m width"]) -> Float[Tensor, "*lead width width"]:
    """YᵀY in float64. O(m width²)."""
    Y = Y.double()
    return Y.mT @ Y


def orthonormalise(
    Y: Float[Tensor, "*lead m width"], against: Sequence[Float[Tensor, "*lead m _"]] = ()
) -> Float[Tensor, "*lead m width"]:
    """Orthonormal columns that span those of Y outside the span of `against`.

    Where that space has fewer dimensions than Y has columns, the rest of the columns are zero: shapes never depend on
    the data, and zero columns are harmless to a projection. O(m width (width + Σ widths)).

    Args:
        Y: the vectors.
        against: blocks with orthonormal (or zero) columns, orthogonal to each other; Y may be anything with respect to
            the last, and is expected to be nearly orthogonal to the others.

    Returns:
        Y's shape: columns orthonormal to rounding, or zero.
    """
    rounding = 100 * torch.finfo(Y.dtype).eps ** 2
    energy = Y.square().sum(-2, dtype=torch.float64)
    # Only the last block of a Golub–Kahan process overlaps with the new one; the others do by rounding, which must go
    # too, or converged directions come back as copies. Twice is enough, and once where the block was well conditioned:
    # the second pass removes what rounding left of the first.
    for blocks in ((*against[-1:], *against), against):
        for B in blocks:
            Y = Y - B @ (B.mT @ Y)
        G = gram(Y)
        left = G.diagonal(dim1=-2, dim2=-1)
        # a column that the projection all but removed holds nothing but rounding
        scale = torch.where(left > rounding * energy, left, torch.inf).rsqrt()
        W, sound = _whitening(scale[..., :, None] * G * scale[..., None, :])
        Y = Y @ (scale[..., :, None] * W).to(Y.dtype)
        if sound and bool((left > _KEPT * energy).all()):
            break
        energy = torch.ones_like(energy)
    return Y


def _whitening(G: Tensor) -> tuple[Tensor, bool]:
    """W with WᵀGW = I: the inverse Cholesky factor, or from eigenvectors where G is singular to rounding.

    Returns:
        W, and whether G was so well conditioned that rounding is not amplified.
    """
    L, failed = torch.linalg.cholesky_ex(G)
    pivots = L.diagonal(dim1=-2, dim2=-1).amin(-1).masked_fill(failed != 0, 0)
    smallest = float(pivots.min()) if pivots.numel() else 1.0
    if smallest > 1e-3:
        eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
        inverse: Tensor = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        return inverse.mT, smallest > _SOUND
    energy, Z = torch.linalg.eigh(G)
    tiny = torch.finfo(G.dtype).tiny
    kept = energy > _DROP * energy[..., -1:].clamp(min=tiny)
    scaled: Tensor = Z * torch.where(kept, energy.clamp(min=tiny).rsqrt(), 0)[..., None, :]
    return scaled, False
