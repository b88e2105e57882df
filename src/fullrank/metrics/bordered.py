"""Two spectra from one tridiagonal form: of a symmetric matrix, and of what is left of it without one direction.

A Householder tridiagonalisation A = Q T Qᵀ may keep its first column fixed, Q e₁ = e₁. What A gains along e₁ then only
touches the first row of T, so that the eigenvalues of A and of A without it cost one reduction instead of two; the
reduction is nine tenths of an eigenvalue decomposition without vectors.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["eigenvalues_with_and_without"]

_SMALL = 128
"""Below this size two plain decompositions take less than a millisecond."""


def eigenvalues_with_and_without(
    gram: Float[Tensor, "*batch n n"],
    shift: Float[Tensor, "*batch n n"],
    axis: Float[Tensor, "*batch n"],
    *,
    coupled: bool,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
    """Eigenvalues of gram + shift and of gram, where shift = acᵀ + caᵀ for an axis a.

    Either c is along a, or (`coupled`) gram·a = 0, as for centred tokens and the vector of ones. In both cases a large
    shift costs the eigenvalues of `gram` no digits. O(n³).

    Args:
        gram: symmetric, finite, float64.
        shift: symmetric, finite, float64.
        axis: a, of any length; zero where there is no shift.
        coupled: whether c may have a part that is not along a.

    Returns:
        The eigenvalues of the sum, then those of `gram`, both rising.
    """
    n = gram.shape[-1]
    if n < _SMALL or gram.device.type != "cpu":
        return torch.linalg.eigvalsh(gram + shift), torch.linalg.eigvalsh(gram)
    length = torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
    e1 = torch.zeros_like(axis)
    e1[..., 0] = 1
    a = torch.where(length > 0, axis / length, e1)
    v = a + torch.where(a[..., :1] < 0, -1.0, 1.0) * e1  # a ↦ ∓e₁, without cancellation
    v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    plain, more = _reflected(gram, v), _reflected(shift, v)
    corner = more[..., 0, 0].clone()
    if coupled:
        plain[..., 0, :] = more[..., 0, :]
        plain[..., :, 0] = more[..., :, 0]
    pairs = [
        _of_one(one, float(add), coupled=coupled)
        for one, add in zip(plain.reshape(-1, n, n), corner.reshape(-1), strict=True)
    ]
    both = torch.stack([torch.stack(pair) for pair in pairs]).reshape(*gram.shape[:-2], 2, n)
    return both[..., 0, :], both[..., 1, :]


def _reflected(A: Tensor, v: Tensor) -> Tensor:
    """(I − 2vvᵀ) A (I − 2vvᵀ)."""
    w = (A @ v[..., None])[..., 0]
    w = w - (v * w).sum(-1, keepdim=True) * v
    return A - 2 * (v[..., :, None] * w[..., None, :] + w[..., :, None] * v[..., None, :])


def _of_one(A: Tensor, corner: float, *, coupled: bool) -> tuple[Tensor, Tensor]:
    from scipy.linalg import lapack  # takes a quarter of a second to import

    n = A.shape[-1]
    room = int(lapack.dsytrd_lwork(n, lower=1)[0])
    # symmetric: LAPACK's column order is the same matrix. With `lower` every reflection leaves e₁ alone.
    _, diagonal, off, _, failed = lapack.dsytrd(A.numpy().T, lower=1, lwork=room, overwrite_a=1)
    less, off_less = (diagonal[1:], off[1:]) if coupled else (diagonal, off)
    with_it = diagonal.copy()
    if not coupled:
        with_it[0] += corner
    whole, failed_whole = lapack.dsterf(with_it, off)
    part, failed_part = lapack.dsterf(less, off_less)
    if failed or failed_whole or failed_part:  # never seen; then nothing is known
        return A.new_full((n,), torch.nan), A.new_full((n,), torch.nan)
    left = torch.from_numpy(part)
    if coupled:  # the axis itself has the eigenvalue 0
        left = torch.cat([left, left.new_zeros(1)]).sort().values
    return torch.from_numpy(whole), left
