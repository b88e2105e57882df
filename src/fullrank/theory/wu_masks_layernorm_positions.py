r"""Wu et al. (arXiv 2502.01951): where the content of a token comes from, under attention that falls off with distance.

**Assumes** causal layers of attention $A_{ij} \propto e^{-m(i-j)}$ alone (ALiBi with equal logits), no skips.

**Symbols.** $t$ `layers`, $m$ `slope`, $x = i - j$ `distance`. Without a slope all weight moves to the first token, the
mask's only centre; with one, the token that is heard best lies at a distance that grows with depth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["alibi_peak", "alibi_rollout"]

Array = NDArray[np.float64]


def alibi_rollout(distance: ArrayLike, *, layers: ArrayLike, slope: ArrayLike) -> Array:
    r"""Weight of the token `distance` back in the product of attention that falls off as $e^{-m(i-j)}$.

    $\binom{t-1+x}{x}\,e^{-mx}(1-e^{-m})^t$ after $t$ causal layers: a sum of $t$ geometric steps. It holds where the
    sequence's start is not in sight; there weight piles up on the first token.

    Args:
        distance: x = i − j ≥ 0.
        layers: t ≥ 1.
        slope: m > 0 per token.

    Returns:
        Adding to 1 over all distances.
    """
    from scipy.special import gammaln

    x, t, m = (np.asarray(one, float) for one in (distance, layers, slope))
    return np.asarray(np.exp(gammaln(t + x) - gammaln(x + 1) - gammaln(t) - m * x + t * np.log(-np.expm1(-m))))


def alibi_peak(*, layers: ArrayLike, slope: ArrayLike) -> Array:
    r"""$(t-1)/(e^m - 1)$: distance at which `alibi_rollout` is largest; it moves away with every layer.

    Args:
        layers: t ≥ 1.
        slope: m > 0.

    Returns:
        Tokens, not rounded.
    """
    return np.asarray((np.asarray(layers, float) - 1) / np.expm1(np.asarray(slope, float)))
