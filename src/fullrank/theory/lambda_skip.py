r"""Lambda-skip connections (arXiv 2410.10609): a skip of strength λ, with a norm, against rank collapse.

**Assumes** layers $Y^+ = D(M Y C_V + \lambda Y)$ with $M$ row-stochastic (softmax) or a state-space kernel and $D$ the
row-wise L2 norm without centring or shift. The practical law is for $C_V = I$ and $M$ near uniform.

**Symbols.** $\lambda$ `strength`, $N$ `tokens`, $d$ `width`, $K$ `depth`, $a$ `share` of $\mu^2$ kept a layer,
$S = \sup\|C_V\|_F$ `value_norm`, $C_M = \sup\|M\|_F$ `mixing_norm` (at most √N for a softmax),
$\mu(Y) = \|Y - \mathbf 1\bar y^\top\|_F$.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["deviation_ratio", "smallest_strength", "spread_share", "start_needed", "strength_threshold", "vacuous"]

Array = NDArray[np.float64]


# ------------------------------------------------------------ the sufficient condition


def strength_threshold(share: ArrayLike, *, value_norm: ArrayLike, mixing_norm: ArrayLike) -> Array:
    r"""What |λ| must exceed for the theorem's first condition, $\lambda^2 > a\,(SC_M + |\lambda|)^2$.

    $|\lambda| > (a + \sqrt a)\,S C_M / (1 - a)$.

    Args:
        share: a in (0, 1).
        value_norm: S.
        mixing_norm: C_M.

    Returns:
        The threshold.
    """
    a = np.asarray(share, float)
    return np.asarray((a + np.sqrt(a)) / (1 - a) * np.asarray(value_norm, float) * np.asarray(mixing_norm, float))


def start_needed(
    strength: ArrayLike,
    share: ArrayLike,
    *,
    tokens: ArrayLike,
    width: ArrayLike,
    depth: ArrayLike,
    value_norm: ArrayLike,
    mixing_norm: ArrayLike,
) -> Array:
    r"""The theorem's second condition, $\mu(Y_0)^2 \ge b$.

    $b = a^{-K}\,\frac{2|\lambda| N d\,SC_M}{\lambda^2 - a(SC_M+|\lambda|)^2}$.

    Args:
        strength: λ.
        share: a in (0, 1).
        tokens: N.
        width: d.
        depth: K.
        value_norm: S.
        mixing_norm: C_M.

    Returns:
        b; infinite where the first condition fails. Rows of norm 1 have μ² ≤ N, so that b > N cannot be met.
    """
    a, size = np.asarray(share, float), np.abs(np.asarray(strength, float))
    product = np.asarray(value_norm, float) * np.asarray(mixing_norm, float)
    room = size**2 - a * (product + size) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = 2 * size * np.asarray(tokens, float) * np.asarray(width, float) * product / room
        found = np.exp(-np.asarray(depth, float) * np.log(a)) * needed
    return np.asarray(np.where(room > 0, found, np.inf))


def smallest_strength(
    share: float, *, tokens: int, width: int, depth: int, value_norm: float = 1.0, mixing_norm: float | None = None
) -> float:
    r"""The smallest |λ| for which the theorem says anything of rows of norm 1: $b \le \mu(Y_0)^2 \le N$ can be met.

    Args:
        share: a in (0, 1).
        tokens: N.
        width: d.
        depth: K.
        value_norm: S.
        mixing_norm: C_M; by default √N.

    Returns:
        |λ|, by bisection: b falls in |λ| above the first condition's threshold.
    """
    mixing = float(tokens) ** 0.5 if mixing_norm is None else mixing_norm
    sizes = {"tokens": tokens, "width": width, "depth": depth, "value_norm": value_norm, "mixing_norm": mixing}
    low = float(strength_threshold(share, value_norm=value_norm, mixing_norm=mixing))
    high = 2 * low
    while float(start_needed(high, share, **sizes)) > tokens:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float(start_needed(middle, share, **sizes)) <= tokens else (middle, high)
    return high


def vacuous(strength: float, share: float, *, tokens: int, value_norm: float, mixing_norm: float | None = None) -> str:
    """One sentence where the theorem says nothing of a skip strength; empty where it does."""
    mixing = float(tokens) ** 0.5 if mixing_norm is None else mixing_norm
    needed = float(strength_threshold(share, value_norm=value_norm, mixing_norm=mixing))
    if abs(strength) > needed:
        return ""
    return (
        f"The theorem asks for |λ| above {needed:.4g} to keep {share:.4g} of the spread a layer, and λ is "
        f"{strength:.4g}: it says nothing here; the practical law does."
    )


# ------------------------------------------------------------ the practical law


def deviation_ratio(strength: ArrayLike) -> Array:
    r"""$|\lambda| / |1 + \lambda|$, by which a layer changes deviation over mean, for $C_V = I$ and $M$ near uniform.

    The mean passes with weight $1 + \lambda$, deviations with λ alone: they die out for every $\lambda > -\tfrac12$
    and take over below, which is why negative strengths do better.

    Args:
        strength: λ.

    Returns:
        The factor; infinite at λ = −1, where the mean is taken away whole.
    """
    lam = np.asarray(strength, float)
    with np.errstate(divide="ignore"):
        return np.asarray(np.abs(lam) / np.abs(1 + lam))


def spread_share(strength: ArrayLike, depth: ArrayLike, *, start: ArrayLike = 0.5) -> Array:
    r"""$\mu^2/\|Y\|^2$ after `depth` layers by the law: its odds grow by $(\lambda/(1+\lambda))^2$ a layer.

    Args:
        strength: λ.
        depth: K.
        start: μ²/‖Y‖² before the first layer, in (0, 1).

    Returns:
        In [0, 1].
    """
    begun = np.asarray(start, float)
    with np.errstate(divide="ignore"):
        log_odds = np.log(begun / (1 - begun)) + 2 * np.asarray(depth, float) * np.log(deviation_ratio(strength))
        # 1/(1 + e^(−x)), without overflow for either sign
        return np.asarray(np.exp(-np.logaddexp(0.0, -log_odds)))
