r"""State-space models (arXiv 2501.00658): how fast they forget, how much they smooth, and polarised channels.

**Assumes** a scalar channel $h_t = A_t h_{t-1} + (1 - A_t)\,b_t$ with decays $A_t \in [A_{\min}, A_{\max}]$ within
$[0, 1]$; a channel of a selective model has $\bar A = e^{\Delta A}$.

**Symbols.** $A$ `decay`, $L$ `tokens`, $t - s$ `distance`, $\Delta$ `step`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["channel_decay", "recency_bound", "recency_rate", "residual_of_stack", "spread_bound"]

Array = NDArray[np.float64]


def recency_bound(distance: ArrayLike, *, largest_decay: ArrayLike) -> Array:
    r"""$|\partial h_t/\partial b_s| \le e^{-\kappa(t-s)}$ with $\kappa = -\log A_{\max}$: the past is forgotten.

    Args:
        distance: t − s ≥ 0.
        largest_decay: A_max in (0, 1].

    Returns:
        In (0, 1].
    """
    return np.asarray(np.exp(-np.asarray(distance, float) * recency_rate(largest_decay)))


def recency_rate(decay: ArrayLike) -> Array:
    r"""$\kappa = -\log A$ of a channel, per token: 0 for one that never forgets."""
    return np.asarray(-np.log(np.asarray(decay, float)))


def spread_bound(*, smallest_decay: ArrayLike, tokens: ArrayLike) -> Array:
    r"""$\max_{t,s}|h_t - h_s| \le (1 - A_{\min}^{L-1})\,\max_{t,s}|b_t - b_s|$, where $h_1 = b_1$.

    Often vacuous: for $A_{\min} = .5$ and $L = 64$ it is 1, and measured spreads are half of it.

    Args:
        smallest_decay: A_min in [0, 1].
        tokens: L ≥ 1.

    Returns:
        The factor, in [0, 1].
    """
    return np.asarray(1 - np.asarray(smallest_decay, float) ** (np.asarray(tokens, float) - 1))


def channel_decay(rate: ArrayLike, *, step: ArrayLike) -> Array:
    r"""$\bar A = e^{-a\Delta}$ of a channel of rate $a$: at $a = 100$, the 'zero' channel, .905 still at Δ = .001.

    Args:
        rate: a ≥ 0; 0 for the 'one' channel, which sums.
        step: Δ > 0.

    Returns:
        In (0, 1].
    """
    return np.asarray(np.exp(-np.asarray(rate, float) * np.asarray(step, float)))


def residual_of_stack(layers: ArrayLike, *, decay: ArrayLike) -> Array:
    r"""Share of white input's size that is left after $n$ equal layers of one decay, in the stationary state.

    Layer by layer the spectrum is multiplied by $|\frac{1-A}{1-Ae^{-i\omega}}|^2$; of its mean over frequencies
    $\int \frac{d\omega}{2\pi} (\frac{(1-A)^2}{1 - 2A\cos\omega + A^2})^n$ the root is returned. It falls like
    $n^{-1/4}$: what is left is slow in the token, which is over-smoothing.

    Args:
        layers: n ≥ 0.
        decay: A in [0, 1).

    Returns:
        In (0, 1].
    """
    depth, kept = np.broadcast_arrays(np.asarray(layers, float), np.asarray(decay, float))
    omega = 2 * np.pi * (np.arange(4096) + 0.5) / 4096
    passed = (1 - kept[..., None]) ** 2 / (1 - 2 * kept[..., None] * np.cos(omega) + kept[..., None] ** 2)
    return np.asarray(np.sqrt((passed ** depth[..., None]).mean(-1)))
