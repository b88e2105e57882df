r"""Causal attention as a random Markov matrix: late queries collapse in width, and the first rows hide it.

mind_the_gap (arXiv 2410.07799) leaves the causal case open; the formulas here are derived. Row t of $A$ has t
independent entries, $A = U + B$ with running means $U_{ts} = 1/t$, $s \le t$, and $B$ of variance $\sigma^2/t^2$.

- $UU^\top$ has the entries $1/\max(t, t')$. On the rows $aT < t \le T$ its eigenfunctions are $\tau^{-1/2}\cos(\omega
  \ln\tau + \varphi)$ with $s = (\tfrac14 + \omega^2)^{-1/2}$: averaging itself has singular values that do not depend
  on T, and differences among what late queries see of them are no matter of randomness.
- Over all rows $s_1 \to 2$ from below, like $2 - 4\pi^2/\ln^2T$ (the truncated Hardy inequality).
- $B$ has a bulk of size $\sigma/\sqrt T$ with a constant of the variance profile.

**Symbols.** $T$ `tokens`, $\sigma$ `deviation`, $\gamma = T/d$ `ratio`, $a$ `after`: late queries are those after aT,
½ as `examine` counts them. Functions broadcast over arrays of tokens, σ and γ; `after` is one number.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "causal_contrast_gain",
    "cesaro_outlier",
    "late_averaging",
    "late_averaging_centred",
    "late_edge",
    "late_stable_rank",
    "late_stable_rank_centred",
    "uniform_stable_rank",
]

Array = NDArray[np.float64]

_HALVINGS: Final = 80
_BINS: Final = 48


# ------------------------------------------------------------ averaging alone


def cesaro_outlier(tokens: ArrayLike) -> Array:
    r"""$s_1(U) = (\tfrac14+\omega^2)^{-1/2}$ over all T rows, which reaches 2 only as $T \to \infty$.

    ω solves $\omega\ln(T+\tfrac12) + \arg[\Gamma(1+2i\omega)/\Gamma(\tfrac12+i\omega)^3] = \pi$. To first order it is
    $\pi/(\ln T + \gamma_E + 6\ln2)$: the $\|UU^\top\| = 4 - 16\pi^2/\ln^2T + 32\pi^2(\gamma_E+6\ln2)/\ln^3T$ that is
    known of the truncated Hardy inequality. The Γ functions that have this slope are taken for the whole phase, which
    singular values bear out to 3e-6 from T = 50.

    Args:
        tokens: T ≥ 4.

    Returns:
        In (1, 2): 1.58 at 50, 1.75 at 1000, 1.85 at a million.
    """
    from scipy.special import loggamma

    log_count = np.log(np.asarray(tokens, float) + 0.5)
    low, high = np.zeros_like(log_count), np.full_like(log_count, 2.0)
    for _ in range(_HALVINGS):
        omega = (low + high) / 2
        phase = omega * log_count + (loggamma(1 + 2j * omega) - 3 * loggamma(0.5 + 1j * omega)).imag
        low, high = np.where(phase < np.pi, omega, low), np.where(phase < np.pi, high, omega)
    return np.asarray((0.25 + np.square((low + high) / 2)) ** -0.5)


def late_averaging(order: ArrayLike, *, tokens: ArrayLike = math.inf, after: float = 0.5) -> Array:
    r"""k-th singular value of U over late rows: $\omega\Lambda = (k-1)\pi + 2\arctan\tfrac1{2\omega}$.

    $\Lambda = \ln\frac{T+1/2}{aT+1/2}$, → ln 2. What `attention_s1` and `attention_s2` of causal heads that attend
    evenly are at any context: .787 and .206 for the later half.

    Args:
        order: k ≥ 1.
        tokens: T; the limit where omitted.
        after: a in (0, 1).

    Returns:
        The singular value, below 2.
    """
    k, span = np.broadcast_arrays(np.asarray(order, float), _span(tokens, after))
    low, high = np.zeros_like(span), (k + 1) * np.pi / span
    for _ in range(_HALVINGS):
        omega = (low + high) / 2
        below = omega * span - 2 * np.arctan2(1.0, 2 * omega) < (k - 1) * np.pi
        low, high = np.where(below, omega, low), np.where(below, high, omega)
    return np.asarray((0.25 + np.square((low + high) / 2)) ** -0.5)


def late_averaging_centred(order: ArrayLike, *, tokens: ArrayLike = math.inf, after: float = 0.5) -> Array:
    r"""The same of U less its mean row over late queries: $(\tfrac14 + (k\pi/\Lambda)^2)^{-1/2}$.

    What `smoothing_gain` is at any context for heads that attend evenly: .219 for the later half.

    Args:
        order: k ≥ 1.
        tokens: T; the limit where omitted.
        after: a in (0, 1).

    Returns:
        The singular value.
    """
    return np.asarray((0.25 + np.square(np.asarray(order, float) * np.pi / _span(tokens, after))) ** -0.5)


def _span(tokens: ArrayLike, after: float) -> Array:
    count = np.asarray(tokens, float)
    with np.errstate(invalid="ignore"):
        finite = np.log((count + 0.5) / (after * count + 0.5))
    return np.asarray(np.where(np.isinf(count), -math.log(after), finite))


def uniform_stable_rank(tokens: ArrayLike) -> Array:
    r"""$\mathrm{sr}(UU^\top) = (2H_T - H_T^{(2)})/s_1^4$ over all rows, which rises like $(\ln T)/8$.

    Tokens of infinitely many independent channels, evenly attended: the gram stable rank of what comes out. It shows no
    collapse, where that of late queries does.

    Args:
        tokens: T ≥ 4.

    Returns:
        1.09 at 64, 1.39 at 1024.
    """
    from scipy.special import digamma, polygamma

    count = np.asarray(tokens, float)
    harmonic, squares = digamma(count + 1) + np.euler_gamma, np.pi**2 / 6 - polygamma(1, count + 1)
    return np.asarray((2 * harmonic - squares) / cesaro_outlier(count) ** 4)


# ------------------------------------------------------------ with randomness


def causal_contrast_gain(deviation: ArrayLike, *, tokens: ArrayLike, shared: ArrayLike = 0.0) -> Array:
    r"""$\sqrt{(6\ln2 - 4 + 2\ln2\,\sigma^2)/T + c}$ of the later half's queries: the width law, exponent −½.

    $\mathbb E\sum_sA_{ts}^2$ averages to $2\ln2\,(1+\sigma^2)/T$ and their mean row has the energy $4(1-\ln2)/T$.

    Args:
        deviation: σ.
        tokens: T.
        shared: c, what values know of the keys: s²/d where W_K and W_V read the same d independent channels.

    Returns:
        The gain, `contrast_gain` at scope `late`.
    """
    variance = np.square(np.asarray(deviation, float))
    constant = 6 * math.log(2) - 4 + 2 * math.log(2) * variance
    return np.asarray(np.sqrt(constant / np.asarray(tokens, float) + np.asarray(shared, float)))


def late_edge(deviation: ArrayLike, *, tokens: ArrayLike, after: float = 0.5) -> Array:
    r"""$\|A - U\|_2$ over late rows: a constant of the variance profile times $\sigma/\sqrt T$.

    Args:
        deviation: σ.
        tokens: T.
        after: a in (0, 1).

    Returns:
        The edge of the bulk; the constant is 2.23 for the later half.
    """
    return np.asarray(_edge(after) * np.asarray(deviation, float) / np.sqrt(np.asarray(tokens, float)))


def late_stable_rank(
    *, tokens: ArrayLike, ratio: ArrayLike = 1.0, deviation: ArrayLike = 1.0, after: float = 0.5
) -> Array:
    r"""Gram stable rank of $AXW$ over late queries, $X X^\top = I$: it falls like 1/T, to almost 1.

    $1 + r + \frac{\kappa}{T}$ with $\Lambda = \ln\tfrac1a$, $\lambda = s_1^2$ of `late_averaging`, $r =
    2(\Lambda - 1 + a)/\lambda^2 - 1$ (.005 at a = ½, which averaging alone leaves) and
    $\lambda^2\kappa = \sigma^4[2(\tfrac1a - 1 + \ln a) + \tfrac1a - 1] + 2\sigma^2(\Lambda-\lambda)
    \tfrac{\Lambda}{1-a} + \gamma[(1+\sigma^2)\Lambda - \lambda]^2$.

    Args:
        tokens: T.
        ratio: γ = T/d.
        deviation: σ.
        after: a in (0, 1).

    Returns:
        The gram stable rank, to order 1/T.
    """
    count, variance = np.asarray(tokens, float), np.square(np.asarray(deviation, float))
    span, top = -math.log(after), float(late_averaging(1, after=after)) ** 2
    left = 2 * (span - 1 + after) / top**2 - 1
    noise = np.square(variance) * _noise_energy(after)
    crossed = 2 * variance * (span - top) * span / (1 - after)
    spread = np.asarray(ratio, float) * np.square((1 + variance) * span - top)
    return np.asarray(1 + left + (noise + crossed + spread) / top**2 / count)


def late_stable_rank_centred(*, tokens: ArrayLike, ratio: ArrayLike = 1.0, after: float = 0.5) -> Array:
    r"""The same with $A - U$: in proportion to T again, whatever σ.

    $BXW$ has $\mathbb E\,\mathrm{tr}\,\Sigma^2 = \tfrac{\sigma^4}T(n_2 + \gamma\ln^2a)$, with $n_2$ the bracket in
    `late_stable_rank`, and the edge $\min_x x^2(1+\gamma z(x))$ over x above B's own, $z(x) = \tfrac1T\sum_i
    s_i^2/(x^2 - s_i^2)$ of B's law. The edge is reached from below, so that at some hundred tokens the rank is up to a
    fifth higher, and lower where entries have heavy tails.

    Args:
        tokens: T.
        ratio: γ = T/d; one number or an array.
        after: a in (0, 1).

    Returns:
        The gram stable rank; T · .044 at γ = 1.
    """
    gamma = np.asarray(ratio, float)
    square, poles = _outside(after)
    edge = np.min(square * (1 + gamma[..., None] * poles), -1)
    share = (_noise_energy(after) + gamma * math.log(after) ** 2) / edge**2
    return np.asarray(np.asarray(tokens, float) * share)


def _noise_energy(after: float) -> float:
    """T tr(BBᵀ)²/σ⁴: 2 ∫∫_{τ' < τ} dτ' dτ/(τ'τ²) + ∫ dτ/τ² over the late rows."""
    pairs = 2 * (1 / after - 1 + math.log(after))
    return pairs + (1 - after) / after


# The variance profile 1/τ² for u < τ on bins, in units of σ/√T: the resolvent of [[0, B], [Bᵀ, 0]] outside of the
# spectrum solves g = 1/(x − S h), h = 1/(x − Sᵀ g), and has a positive solution down to the edge alone.


@functools.cache
def _profile(after: float) -> tuple[Array, Array]:
    """Sums over keys for each row bin, and over rows for each key bin; keys before the late rows are one bin."""
    width = (1 - after) / _BINS
    tau = after + width * (np.arange(_BINS) + 0.5)
    before = np.tri(_BINS, k=-1) + 0.5 * np.eye(_BINS)
    rows = np.concatenate([np.full((_BINS, 1), after), width * before], 1) / tau[:, None] ** 2
    keys = np.concatenate([np.ones((1, _BINS)), before.T]) * (width / tau**2)
    return rows, keys


def _resolvent(x: float, after: float) -> Array | None:
    """Find g at x outside of the spectrum by Newton's method, which rises to it; None inside."""
    rows, keys = _profile(after)
    g = np.full(_BINS, 1 / x)
    for _ in range(60):
        column = x - keys @ g
        if np.any(column <= 0):
            return None
        h = 1 / column
        left = x - rows @ h
        if np.any(left <= 0):
            return None
        # F(g) = 1/(x − S h(g)) − g, and S h has the slope S diag(h²) Sᵀ
        slope = (rows * h**2) @ keys / left[:, None] ** 2 - np.eye(_BINS)
        step = np.linalg.solve(slope, g - 1 / left)
        if np.any(step < -1e-9) or not np.all(np.isfinite(step)):
            return None
        g = g + step
        if np.max(np.abs(step)) < 1e-12:
            return np.asarray(g)
    return None


@functools.cache
def _edge(after: float) -> float:
    low, high = 0.0, 4 / math.sqrt(after)
    for _ in range(26):
        x = (low + high) / 2
        low, high = (low, x) if _resolvent(x, after) is not None else (x, high)
    return high


@functools.cache
def _outside(after: float) -> tuple[Array, Array]:
    """x² and z(x) for x from the edge on."""
    width = (1 - after) / _BINS
    places = _edge(after) * (1 + np.geomspace(1e-6, 3.0, 60))
    found = [(x, g) for x in places.tolist() if (g := _resolvent(x, after)) is not None]
    return np.array([x * x for x, _ in found]), np.array([width * float(np.sum(x * g - 1)) for x, g in found])
