"""Which tokens count, in what precision they are added up, and below which level a number is rounding."""

from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import BatchError

__all__ = ["accumulate", "balanced", "floor", "mean_token", "real_tokens"]

_FLOOR_IN_EPS: Final = 8


def accumulate(X: Tensor) -> Tensor:
    """`X` in the precision of the arithmetic: float32 at least, float64 stays."""
    return X if X.dtype == torch.float64 else X.float()


def floor(dtype: torch.dtype) -> float:
    """Relative level below which what is left of a token after its mean is rounding: 8 ε of the run's dtype.

    A stream whose tokens have all become one does not reach residual 0: every write rounds every entry by up to
    ε/2, and a post-norm stack of identical tokens settles near 1.1 ε (1.3e-7 in float32, golden `wu-float-floor`).
    Eight ε is seven times that plateau: 9.5e-7 in float32, 7.8e-3 in float16, 6.3e-2 in bfloat16, 1.8e-15 in
    float64. Applies to `residual`, √`token_energy` and σ₁ of the centred over σ₁ of the uncentred states; ranks of
    a matrix below it are ranks of noise. The dtype is that in which the model computes, not that of the tensor
    handed over.
    """
    return _FLOOR_IN_EPS * torch.finfo(dtype).eps


def real_tokens(
    X: Float[Tensor, "*batch tokens width"], mask: Tensor | None
) -> tuple[Float[Tensor, "*batch some_tokens width"], Bool[Tensor, "*batch some_tokens"]]:
    """`X` with padded tokens set to zero (whatever stood there, NaN included), and which tokens are real.

    No tokens at all become one padded token, so that what follows answers NaN and needs no special case.

    Args:
        X: token vectors.
        mask: True = real token; None when all are.

    Returns:
        `X` in the precision of the arithmetic, and the mask as a tensor.

    Raises:
        BatchError: where the mask has another shape than the tokens, or the vectors have no entries.
    """
    *batch, tokens, width = X.shape
    if width == 0:
        raise BatchError(f"X has shape {tuple(X.shape)}; token vectors need at least one entry.")
    if mask is not None and mask.shape != X.shape[:-1]:
        raise BatchError(
            f"mask has shape {tuple(mask.shape)}; for X of shape {tuple(X.shape)} it must be {(*batch, tokens)}."
        )
    if tokens == 0:
        return accumulate(X.new_zeros(*batch, 1, width)), X.new_zeros(*batch, 1, dtype=torch.bool)
    X = accumulate(X)
    if mask is None:
        return X, torch.ones((), dtype=torch.bool, device=X.device).expand(*batch, tokens)
    return torch.where(mask[..., None], X, 0), mask


def balanced(X: Tensor, *others: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> tuple[Tensor, ...]:
    """The tensors divided by one power of two that brings the largest entry near 1, and that power of two, last.

    Squares of healthy float32 numbers overflow above 2e19 and vanish below 1e-23; both occur in collapsing networks.
    Dividing by a power of two is exact.
    """
    peak = torch.linalg.vector_norm(X, ord=torch.inf, dim=dim, keepdim=True)
    for other in others:
        peak = torch.maximum(peak, torch.linalg.vector_norm(other, ord=torch.inf, dim=dim, keepdim=True))
    exponent = torch.frexp(peak.double()).exponent.clamp(-120, 120).to(X.dtype)
    shrink = torch.exp2(-exponent)
    return (*(tensor * shrink for tensor in (X, *others)), torch.exp2(exponent))


def mean_token(
    X: Float[Tensor, "*batch tokens width"], real: Bool[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch 1 width"]:
    """x̄, the mean of the real tokens (padded ones must be zero), refined once.

    The second step takes out the rounding of the first: identical tokens are then centred to zero, not to ε.
    """
    n = real.sum(-1)[..., None, None].to(X.dtype)
    x_bar = X.sum(-2, keepdim=True) / n
    return x_bar + torch.where(real[..., None], X - x_bar, 0).sum(-2, keepdim=True) / n
