"""Single channels and entries of the stream: massive activations, rogue dimensions, what a dtype must hold."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import accumulate, balanced, real_tokens

__all__ = ["channel_entropy", "max_abs", "max_abs_position", "max_to_median"]


def channel_entropy(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Entropy of the energy over channels, −Σ_c e_c log e_c / log d with e_c = Σ_t x_tc² / ‖X‖².

    Range [0, 1]: 1 when all channels carry the same energy, 0 when one carries all; null ≈ 1 − 1/(T log d).
    Invariant to token order and scale, not to rotation (that is its point). NaN for width 1. O(T d).
    """
    X, _ = real_tokens(X, mask)
    X, _ = balanced(X)
    energy = X.square().sum(-2)
    share = energy / energy.sum(-1, keepdim=True)
    if X.shape[-1] == 1:
        return torch.full_like(share[..., 0], torch.nan)
    return (-torch.xlogy(share, share).sum(-1) / math.log(X.shape[-1])).clamp(0, 1)


def max_to_median(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Largest |x| over the median |x| of all entries of real tokens (the lower median where their number is even).

    Range [1, ∞]; null ≈ √(2 log(T d)) / 0.6745, about 8 for T d = 10⁶; massive activations stand at 10³ and more
    (Sun et al. 2024). Invariant to token order and scale, not to rotation. O(T d).
    """
    *batch, tokens, _ = X.shape
    if tokens == 0:
        return accumulate(X.new_full(tuple(batch), torch.nan))
    size = X.detach().abs()  # the order of entries is the same in every dtype: no copy in a wider one
    if mask is not None:
        size = torch.where(mask[..., None], size, torch.nan)
    size = size.flatten(-2)
    median = accumulate(size.nanmedian(-1).values)
    peak = accumulate(size.nan_to_num(nan=0.0, posinf=torch.inf).amax(-1))
    return peak / median


def max_abs(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Largest |x| of all entries of real tokens: what the dtype that holds the states must reach.

    Range [0, ∞]; null ≈ √(2 log(T d)) for entries of unit variance. NaN where an entry is, or without a token.
    Invariant to token order alone. O(T d).
    """
    return _sizes(X, mask).amax(-1)


def max_abs_position(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Index, among the real tokens, of the one that holds the largest |x|; of several the first.

    The key that an attention sink rests on often holds it: see `sink_position`. NaN where `max_abs` is. Invariant to
    scale alone. O(T d).
    """
    peak, index = _sizes(X, mask).max(-1)
    if mask is not None and mask.shape[-1]:  # padding before a sequence does not count
        index = (mask.cumsum(-1) - 1).gather(-1, index[..., None])[..., 0]
    return torch.where(peak.isnan(), torch.nan, index.to(peak.dtype))


def _sizes(X: Tensor, mask: Tensor | None) -> Tensor:
    """Largest |x| of every token, 0 of padded ones; a single NaN where no token is real."""
    if X.shape[-2] == 0:
        return accumulate(X.new_full((*X.shape[:-2], 1), torch.nan))
    sizes = accumulate(torch.linalg.vector_norm(X.detach(), ord=torch.inf, dim=-1))  # exact in every dtype
    if mask is None:
        return sizes
    sizes = torch.where(mask, sizes, 0)
    return torch.where(mask.any(-1, keepdim=True), sizes, torch.nan)
