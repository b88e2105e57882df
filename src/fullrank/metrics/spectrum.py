"""Singular values of token matrices: the only place with the Gram trick.

σ(X)² are the eigenvalues of XXᵀ or XᵀX, whichever is smaller; the product is taken in float64, by blocks of tokens, so
that the values of float32, float16 and bfloat16 states are resolved far below the ε of their own dtype (down to about
√n 1.5e-8 σ₁). A float64 state has no wider type to square in: it gets a true singular value decomposition.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import mean_token, real_tokens
from fullrank.metrics.bordered import eigenvalues_with_and_without

__all__ = ["both_singular_values", "singular_values"]

_BLOCK = 2048
"""Tokens turned to float64 at a time."""


def singular_values(
    X: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
    *,
    centered: bool = False,
) -> Float[Tensor, "*batch values"]:
    """The min(T, d) singular values of X, or of X − 1x̄ᵀ, in float64 and falling order.

    Padded tokens change none of them. NaN where X is not finite. O(T d min(T, d)).

    Args:
        X: token vectors.
        mask: which tokens are real.
        centered: subtract the mean of the real tokens first.

    Returns:
        The values, zeros at the end where the rank is smaller.
    """
    if X.dtype == torch.float64:
        X, real = real_tokens(X, mask)
        return _factorise(_centered(X, real) if centered else X)
    gram, shift, _ = _gram(X, mask, centered=centered)
    return _roots(gram if centered else gram + shift)


def both_singular_values(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> tuple[Float[Tensor, "*batch values"], Float[Tensor, "*batch values"]]:
    """Singular values of X and of X − 1x̄ᵀ from one Gram product.

    The product is that of the centred tokens; the mean comes back as a correction of rank two, so that a large mean
    costs the centred values no digits.

    Args:
        X: token vectors.
        mask: which tokens are real.

    Returns:
        The uncentred values, then the centred ones.
    """
    if X.dtype == torch.float64:
        return singular_values(X, mask), singular_values(X, mask, centered=True)
    gram, shift, axis = _gram(X, mask, centered=True)
    finite = gram.isfinite().all(-1).all(-1)[..., None]
    gram, shift = (torch.where(finite[..., None], one, 0) for one in (gram, shift))
    axis = torch.where(finite, axis, 0)
    both = eigenvalues_with_and_without(gram, shift, axis, coupled=X.shape[-1] >= X.shape[-2])
    uncentered, centered = (torch.where(finite, one.flip(-1).clamp(min=0).sqrt(), torch.nan) for one in both)
    return uncentered, centered


def _centered(X: Tensor, real: Tensor) -> Tensor:
    return torch.where(real[..., None], X - mean_token(X, real), 0)


def _gram(X: Tensor, mask: Tensor | None, *, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix of the (centred) tokens, what must be added to it for the uncentred ones, and along which axis."""
    X, real = real_tokens(X, mask)
    T, d = X.shape[-2:]
    n = real.sum(-1)[..., None, None].double()
    total = sum(block.double().sum(-2, keepdim=True) for block in X.split(_BLOCK, -2))
    x_bar = torch.where(n > 0, total / n, 0) if centered else torch.zeros_like(n * total)

    def tokens(start: int) -> Tensor:
        some = slice(start, start + _BLOCK)
        block = X[..., some, :].double()
        return torch.where(real[..., some, None], block - x_bar, 0) if centered else block

    if d < T:
        gram = X.new_zeros(*X.shape[:-2], d, d, dtype=torch.float64)
        for start in range(0, T, _BLOCK):
            block = tokens(start)
            gram += block.mT @ block
        return gram, n * x_bar.mT * x_bar, x_bar[..., 0, :]
    block = torch.cat([tokens(start) for start in range(0, T, _BLOCK)], -2)
    along = block @ x_bar.mT  # (*batch, tokens, 1)
    one = real[..., None].double()
    shift = along * one.mT + one * along.mT + x_bar.square().sum(-1, keepdim=True) * one * one.mT
    return block @ block.mT, shift, one[..., 0]


def _roots(gram: Tensor) -> Tensor:
    finite = gram.isfinite().all(-1).all(-1)[..., None]
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0))
    return torch.where(finite, eigenvalues.flip(-1).clamp(min=0).sqrt(), torch.nan)


def _factorise(X: Tensor) -> Tensor:
    finite = X.isfinite().all(-1).all(-1)[..., None]
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite[..., None], X, 0)), torch.nan)
