"""How the energy of the stream is spread over its channels: massive activations and rogue dimensions."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import accumulate, balanced, real_tokens

__all__ = ["channel_entropy", "max_to_median"]


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
