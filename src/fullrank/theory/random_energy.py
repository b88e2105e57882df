r"""Softmax of independent Gaussian logits: the random energy model, at finitely many keys and in the limit.

$n$ keys, logits iid $\mathcal N(0, s^2)$, $A_i = e^{a_i}/\sum_j e^{a_j}$, gauge $b = s/\sqrt{\log n}$; transition at
$b = \sqrt2$ as $n\to\infty$ (Derrida 1981; giorlandino_goldt, arXiv 2505.24333). At finite n, with
$L_k(u) = \mathbb E[e^{ka}\exp(-ue^a)]$ and $1/Z^k = \int_0^\infty u^{k-1}e^{-uZ}du/\Gamma(k)$,
$$Y_k = \mathbb E\sum_iA_i^k = \frac n{\Gamma(k)}\int_0^\infty u^{k-1}L_k(u)L_0(u)^{n-1}\,du,\qquad
H = \mathbb E\log Z - n\int_0^\infty\mathbb E[a\,e^{a}e^{-ue^a}]L_0(u)^{n-1}\,du,$$
exact, two nested one-dimensional integrals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "TRANSITION",
    "inverse_participation",
    "inverse_participation_limit",
    "participation_moment",
    "participation_moment_limit",
    "participation_variance_moment",
    "row_entropy",
    "row_entropy_exact",
    "row_overlap",
]

Array = NDArray[np.float64]

TRANSITION: Final = math.sqrt(2.0)
"""b at which a vanishing share of the keys takes all attention as their number grows."""

_MOST_S = 24.0  # beyond, 1 − Y₂ and H fall like 1/s
_SHAPE_S, _COARSE_S, _FINE_S = 0.25, 36, 601
_MOST_LOG, _COARSE_LOG, _FINE_LOG = math.log(2.0**24), 32, 94  # of log n; more keys than that are taken as so many


# ------------------------------------------------------------ the limit


def inverse_participation_limit(b: ArrayLike) -> Array:
    r"""$Y_2 = \max(0, 1 - \sqrt2/b)$ as the number of keys grows; in β, q, p: $b = \beta\sqrt{q(q-p)}$.

    Source: giorlandino_goldt (2505.24333), Result 1, with $\beta_c = \sqrt{2/(q(q-p))}$.

    Args:
        b: gauge, logit standard deviation over √log n, ≥ 0.

    Returns:
        Y₂ in [0, 1), of the shape of `b`.
    """
    b = np.asarray(b, dtype=np.float64)
    return np.asarray(1 - np.minimum(1.0, TRANSITION / np.maximum(b, 1e-300)))


def participation_moment_limit(order: float, b: ArrayLike) -> Array:
    r"""$\mathbb EY_k = \Gamma(k-m)/[\Gamma(k)\Gamma(1-m)]$, $m = \sqrt2/b < 1$; 0 where $b \le \sqrt2$.

    Moments of the Poisson–Dirichlet weights PD(m, 0): $Y_2 = 1-m$, $Y_3 = (1-m)(2-m)/2$.

    Args:
        order: k > 1.
        b: gauge.

    Returns:
        The moment, of the shape of `b`.
    """
    from scipy.special import gammaln

    b = np.asarray(b, dtype=np.float64)
    frozen = b > TRANSITION
    m = np.where(frozen, TRANSITION / np.where(frozen, b, 2.0), 0.5)
    return np.asarray(np.where(frozen, np.exp(gammaln(order - m) - gammaln(order) - gammaln(1 - m)), 0.0))


# ------------------------------------------------------------ finitely many keys, exactly


def participation_moment(order: float, s: ArrayLike, keys: ArrayLike) -> Array:
    r"""$Y_k = \mathbb E\sum_iA_i^k$ of n iid logits of standard deviation s, by quadrature (module docstring).

    Relative error below 1e-3 for s ≤ 24. n^{1−k} at s = 0, towards 1 as s grows. About a millisecond a point at s = 1,
    30 ms at s = 24: for many points use `inverse_participation`.

    Args:
        order: k ≥ 1.
        s: standard deviation of the logits within a row, ≥ 0.
        keys: n ≥ 1, need not be whole.

    Returns:
        Moments, of the broadcast shape.
    """
    return _pointwise(lambda one, n: _moment(_Laplace(one, float(order)), float(order), n), s, keys)


def participation_variance_moment(s: ArrayLike, keys: ArrayLike) -> Array:
    r"""$\mathbb E(\sum_iA_i^2)^2$ of n iid logits of standard deviation s, by quadrature.

    It is $\tfrac1{\Gamma(4)}\int u^3[nL_4L_0^{n-1} + n(n-1)L_2^2L_0^{n-2}]\,du$ (module docstring).
    Its limit is $(1-m)(3-2m)/3$, $m = \sqrt2/b < 1$; above the transition, where rows differ, more than $Y_2^2$.

    Args:
        s: standard deviation of the logits within a row, ≥ 0.
        keys: n ≥ 1.

    Returns:
        The second moment of a row's participation, of the broadcast shape.
    """

    def law(one: float, n: Array) -> Array:
        at, two = _Laplace(one, 4.0), _Laplace(one, 2.0)
        single = np.exp((n[:, None] - 1) * at.log_laplace) @ at.tilted
        pair = np.exp((n[:, None] - 2) * at.log_laplace) @ np.square(two.tilted)
        return np.asarray(n * (single + (n - 1) * pair) / 6 * at.step)

    return _pointwise(law, s, keys)


def row_entropy_exact(s: ArrayLike, keys: ArrayLike) -> Array:
    """H in nats of n iid logits of standard deviation s, by quadrature (module docstring); as dear as the moments.

    Args:
        s: standard deviation of the logits within a row, ≥ 0.
        keys: n ≥ 1, need not be whole.

    Returns:
        Mean row entropies, from log n at s = 0 towards 0, of the broadcast shape.
    """
    return _pointwise(lambda one, n: _entropy(_Laplace(one, 1.0), n), s, keys)


class _Laplace:
    """L_0 and e^{−kx} L_k at nodes x = −log u, and what the entropy needs.

    e^{-ue^a} depends on log u + a alone, so that every expectation over a is a window of one function slid along.
    Trapezoids are exact here, but for their tails, once steps resolve one unit of a and half a standard deviation.
    """

    def __init__(self, s: float, order: float):
        s = max(s, 1e-3)
        fine = min(0.4, 0.5 * s)
        reach, stride = math.ceil(10 * s / fine), max(1, int(0.4 / fine))
        a = fine * np.arange(-reach, reach + 1)
        weight = np.exp(-np.square(a / s) / 2)
        weight /= weight.sum()
        self.step = fine * stride
        steps = math.ceil((36 + 18 * s) / self.step)
        self.x = self.step * (np.arange(steps) - (6 + 9 * s) // self.step)
        y = fine * np.arange(-reach, stride * (steps - 1) + reach + 1) - self.x[-1]  # log(u e^a), upwards
        y = np.minimum(y, 8.0)  # e^{-e^8} is zero
        kernel = np.exp(-np.exp(y))
        self.log_laplace = np.log(np.maximum(_slid(kernel, weight, stride), 1e-300))
        self.tilted = _slid(np.exp(order * y) * kernel, weight, stride)
        self.tilted_logit = _slid(np.exp(y) * kernel, weight * a, stride)


def _slid(function: Array, weight: Array, stride: int) -> Array:
    """Σ_a w(a) f(a − x) for descending −x, returned for ascending x."""
    windows = np.lib.stride_tricks.sliding_window_view(function, len(weight))[::stride]
    return np.asarray((windows @ weight)[::-1])


def _moment(at: _Laplace, order: float, keys: Array) -> Array:
    rest = np.exp((keys[:, None] - 1) * at.log_laplace)
    return np.asarray(keys / math.gamma(order) * (rest @ at.tilted) * at.step)


def _entropy(at: _Laplace, keys: Array) -> Array:
    rest = np.exp((keys[:, None] - 1) * at.log_laplace)
    log_partition = (np.exp(-np.exp(-at.x)) - rest * np.exp(at.log_laplace)).sum(-1) * at.step
    return np.asarray(np.maximum(log_partition - keys * (rest @ at.tilted_logit) * at.step, 0.0))


def _pointwise(law: Callable[[float, Array], Array], s: ArrayLike, keys: ArrayLike) -> Array:
    s, keys = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(keys, dtype=np.float64))
    found = np.empty(s.shape)
    for index in np.ndindex(s.shape):
        found[index] = law(float(s[index]), np.atleast_1d(keys[index]))[0]
    return found


# ------------------------------------------------------------ finitely many keys, for many points


def inverse_participation(s: ArrayLike, keys: ArrayLike) -> Array:
    r"""$Y_2(s, n)$ between nodes of a table of the exact values, made once; relative error below 1 %.

    $\simeq e^{s^2}/n = n^{b^2-1}$ for $b < 1/\sqrt2$; `inverse_participation_limit` as n grows at fixed b.

    Args:
        s: standard deviation of the logits within a row, ≥ 0.
        keys: n ≥ 1, need not be whole.

    Returns:
        Y₂ in [1/n, 1], of the broadcast shape; 0.1 µs a point.
    """
    s, log_keys = np.asarray(s, dtype=np.float64), np.log(np.maximum(keys, 1.0))
    log_gain = _between(_tables()[0], np.minimum(s, _MOST_S), log_keys)
    found = np.exp(log_gain - log_keys)
    return np.asarray(np.clip(1 - (1 - found) * np.minimum(1.0, _MOST_S / np.maximum(s, 1e-9)), 0.0, 1.0))


def row_entropy(s: ArrayLike, keys: ArrayLike) -> Array:
    r"""Mean row entropy H(s, n) in nats between nodes of a table of exact values; $\simeq\log n - s^2/2$ for small s.

    Args:
        s: standard deviation of the logits within a row, ≥ 0.
        keys: n ≥ 1, need not be whole.

    Returns:
        H in [0, log n], of the broadcast shape.
    """
    s, log_keys = np.asarray(s, dtype=np.float64), np.log(np.maximum(keys, 1.0))
    share = _between(_tables()[1], np.minimum(s, _MOST_S), log_keys)
    return np.asarray(share * log_keys * np.minimum(1.0, _MOST_S / np.maximum(s, 1e-9)))


def row_overlap(
    participation: ArrayLike, correlation: ArrayLike, keys: ArrayLike, *, head_width: ArrayLike = math.inf
) -> Array:
    r"""$E\sum_sA_{ts}A_{t's}$ of two rows whose logits correlate by r.

    $\tfrac1ng^{\kappa}e^{(1-\kappa)\log^2g/(2d_h)}(1 - .8Y_2^2\sqrt{r(1-r)})$ with $g = nY_2$ and
    $\kappa = r + Y_2\,r(1-r)/(1+r)$: 1/n for independent rows (r = 0), Y₂ for equal ones (r = 1), exact for small s,
    where it is $e^{rs^2}/n$, and where Y₂ = 1 with the exponent of two rows agreeing on their largest logit,
    $n^{-(1-r)/(1+r)}$; in between an interpolation, fitted in the last factor, within a sixth of simulation for n up to
    500. The exponential: keys of a narrow head differ in length, and all queries prefer the long ones. Derived here.

    Args:
        participation: Y₂ of each row.
        correlation: r in [0, 1], of logits of two rows over keys.
        keys: n.
        head_width: d_h, of which a key's squared length fluctuates by √(2/d_h).

    Returns:
        The overlap, in [1/n, Y₂], of the broadcast shape.
    """
    Y2, n = np.asarray(participation, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    r = np.clip(np.asarray(correlation, dtype=np.float64), 0.0, 1.0)
    kappa = r * (1 + Y2 * (1 - r) / (1 + r))
    log_gain = np.log(np.maximum(Y2 * n, 1.0))
    exponent = kappa * log_gain + (1 - kappa) * np.square(log_gain) / (2 * np.asarray(head_width, dtype=np.float64))
    fewer = 1 - 0.8 * np.square(Y2) * np.sqrt(r * (1 - r))
    return np.asarray(np.maximum(np.exp(np.minimum(exponent, log_gain)) * fewer, 1.0) / n)


def _between(table: Array, s: Array, log_keys: Array) -> Array:
    """Bilinear in (asinh-spaced s, log n); where there are few n, along one curve for each."""
    column = np.minimum(log_keys, _MOST_LOG) * ((_FINE_LOG - 1) / _MOST_LOG)
    j = np.minimum(column.astype(np.intp), _FINE_LOG - 2)
    y = column - j
    row = np.arcsinh(s * (1 / _SHAPE_S)) * ((_FINE_S - 1) / math.asinh(_MOST_S / _SHAPE_S))
    i = np.minimum(row.astype(np.intp), _FINE_S - 2)
    if j.size <= 64:
        curves = (table[:, j.ravel()] * (1 - y.ravel()) + table[:, j.ravel() + 1] * y.ravel()).T.ravel()
        at = i + _FINE_S * np.arange(j.size).reshape(j.shape)
        low = curves[at]
        return np.asarray(low + (row - i) * (curves[at + 1] - low))
    flat, at = table.ravel(), i * _FINE_LOG + j
    low = flat[at] * (1 - y) + flat[at + 1] * y
    high = flat[at + _FINE_LOG] * (1 - y) + flat[at + _FINE_LOG + 1] * y
    return np.asarray(low + (row - i) * (high - low))


@functools.cache
def _tables() -> tuple[Array, Array]:
    """log(n Y₂) and H/log n: exact at a few (s, n), by splines at many."""
    from scipy.interpolate import RectBivariateSpline

    log_keys, s_places = np.linspace(0.0, _MOST_LOG, _COARSE_LOG), np.linspace(0.0, 1.0, _COARSE_S)
    keys, reach = np.exp(log_keys), math.asinh(_MOST_S / _SHAPE_S)
    gains, shares = [], []
    for s in _SHAPE_S * np.sinh(reach * s_places):
        at = _Laplace(float(s), 2.0)
        gains.append(np.log(keys * _moment(at, 2.0, keys)))
        shares.append(_entropy(at, keys)[1:] / log_keys[1:])
    share = np.array(shares)
    share = np.concatenate([2 * share[:, :1] - share[:, 1:2], share], 1)  # one key has no entropy; its share goes on
    fine = np.linspace(0.0, 1.0, _FINE_S), np.linspace(0.0, _MOST_LOG, _FINE_LOG)
    gain, share = (RectBivariateSpline(s_places, log_keys, one)(*fine) for one in (np.array(gains), share))
    return np.asarray(gain), np.asarray(share)
