r"""DeepScaleLM (arXiv 2403.09635): variance and covariance through softmax attention at initialisation, and back.

**Assumes** independent weights of mean 0, a wide head, tokens of mean square q whose pairs all have the product rq, all
of which are seen, and logits so small that the softmax is an exponential over its mean ($(1-r)s^2$ well below
$\log T$).

**Symbols.** r `correlation` between tokens, T `tokens`, q = σ² `size`, $s$ `logit_std` of logits between independent
tokens of that size ($s^2 = d\,\sigma_{qk}^2\sigma^4$ in the paper's units), `gain` the variance gain of the values:
$d\sigma_v^2$ alone, $d^2\sigma_v^2\sigma_o^2$ with the output. Gradients: $\sigma_g^2$ `gradient`, their correlation
between tokens $r_g$ `gradient_correlation`. Formulas with [derived] are of this file. All broadcast.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "attention_backward",
    "attention_backward_covariance",
    "attention_covariance",
    "attention_variance",
    "softmax_backward",
    "softmax_variance",
]

Array = NDArray[np.float64]
Order = Literal["exponential", "linear", "code"]


def _all(*values: ArrayLike) -> list[Array]:
    return [np.asarray(one, dtype=np.float64) for one in values]


# ------------------------------------------------------------ softmax


def softmax_variance(correlation: ArrayLike, *, logit_std: ArrayLike, tokens: ArrayLike) -> Array:
    r"""$\mathrm{Var}A_{ts} = (e^{(1-r)s^2} - 1)/T^2$.

    Args:
        correlation: r, of the keys: what logits of one query share drops out.
        logit_std: s.
        tokens: T.

    Returns:
        Variance of an entry of the attention matrix.
    """
    r, s, T = _all(correlation, logit_std, tokens)
    return np.asarray(np.expm1((1 - r) * s * s) / (T * T))


def softmax_backward(gradient: ArrayLike, *, correlation: ArrayLike, logit_std: ArrayLike, tokens: ArrayLike) -> Array:
    r"""$\sigma_g^2e^{(1-r)s^2}/T^2$: variance of the gradient of a logit.

    Args:
        gradient: σ_g² of independent gradients of the entries of A.
        correlation: r.
        logit_std: s.
        tokens: T.

    Returns:
        The variance, up to 1/T.
    """
    g, r, s, T = _all(gradient, correlation, logit_std, tokens)
    return np.asarray(g * np.exp((1 - r) * s * s) / (T * T))


# ------------------------------------------------------------ attention


def attention_variance(
    correlation: ArrayLike,
    *,
    tokens: ArrayLike,
    logit_std: ArrayLike,
    size: ArrayLike = 1.0,
    gain: ArrayLike = 1.0,
    width: ArrayLike = math.inf,
    order: Order = "exponential",
) -> Array:
    r"""$g\,q\,[r + (1-r)\,e^{(1-r)s^2}/T]$; linear order $g\,q\,[r + (1-r)(1 + (1-r)s^2)/T]$.

    For $\mathbb E\sum_sA_{ts}^2 = e^{(1-r)s^2}/T$ while one key does not carry the sum. Keys that a query likes agree
    along its direction, one of d: with `width` $(1-r)^2s^2(1-e^{(1-r)s^2}/T)^3/d$ is added in brackets [derived],
    without which the law is a quarter low at r = 0, s = 1, T = d.

    Args:
        correlation: r.
        tokens: T.
        logit_std: s.
        size: q.
        gain: g.
        width: d; by default infinite.
        order: `exponential`, `linear`; `code` is as `linear` here.

    Returns:
        Variance of the entries of what attention writes.
    """
    r, T, s, q, g = _all(correlation, tokens, logit_std, size, gain)
    x = _spread(r, s, T)
    Y2 = np.minimum(np.exp(x) if order == "exponential" else 1 + x, T) / T
    return np.asarray(g * q * (r + (1 - r) * (Y2 + _tilt(x, Y2, width))))


def _spread(r: Array, s: Array, T: Array) -> Array:
    """(1 − r)s², variance of a row's logits, held where one key has all the attention: beyond, no law of this file."""
    return np.asarray(np.minimum((1 - r) * s * s, np.log(T)))


def _tilt(x: Array, Y2: Array, width: ArrayLike) -> Array:
    """Square of the mean of the attended tokens along the query's direction."""
    return np.asarray(x * (1 - Y2) ** 3 / np.asarray(width, float))


def attention_covariance(
    correlation: ArrayLike,
    *,
    tokens: ArrayLike,
    logit_std: ArrayLike = 0.0,
    size: ArrayLike = 1.0,
    gain: ArrayLike = 1.0,
    width: ArrayLike = math.inf,
    order: Order = "exponential",
) -> Array:
    r"""$g\,q\,[r + (1-r)\,e^{r(1-r)s^2}/T]$ between two tokens [derived]; linear order $g\,q\,[r + (1-r)/T]$.

    Two queries of cosine r like the same keys by so much; with `width` r times what the variance has is added. The
    order `code` is the paper's published $g\,q\,[r + ((1-r) + 2(1-r)^2s^2)/T]$; simulation does not show its last term.

    Args:
        correlation: r.
        tokens: T.
        logit_std: s; not used at linear order.
        size: q.
        gain: g.
        width: d; by default infinite. For the exponential order alone.
        order: of the three.

    Returns:
        Covariance of an entry between two tokens of what attention writes.
    """
    r, T, s, q, g = _all(correlation, tokens, logit_std, size, gain)
    x = _spread(r, s, T)
    added = {
        "exponential": (1 - r) * (np.exp(r * x) / T + r * _tilt(x, np.minimum(np.exp(x) / T, 1.0), width)),
        "linear": (1 - r + 0 * s) / T,
        "code": (1 - r) * (1 + 2 * x) / T,
    }[order]
    return np.asarray(g * q * (r + added))


def attention_backward(
    gradient: ArrayLike,
    *,
    correlation: ArrayLike,
    gradient_correlation: ArrayLike,
    tokens: ArrayLike,
    logit_std: ArrayLike,
    gain: ArrayLike = 1.0,
    width: ArrayLike = math.inf,
) -> Array:
    r"""Variance of the gradient that attention passes back to its input [derived].

    $g\sigma_g^2\,[V + Q + K]$ through values, queries and keys, with $x = (1-r)s^2$, $Y_2 = e^x/T$, $Y_3 = e^{3x}/T^2$,
    $B = Y_2 - 2Y_3 + Y_2^2$: $V = r_ge^{rx} + (1-r_g)Y_2$, $Q = (1-r)x\,[B + (1-Y_2)^2/d]$,
    $K = x\,[r\,r_ge^{rx} + (1-r\,r_g)B]$. V alone, as often quoted, is 3 times low at r = 0, s = 1.

    Args:
        gradient: σ_g².
        correlation: r of the input.
        gradient_correlation: r_g of the gradients of the output.
        tokens: T.
        logit_std: s.
        gain: g.
        width: d; by default infinite.

    Returns:
        The variance.
    """
    v, r, r_g, T, s, g = _all(gradient, correlation, gradient_correlation, tokens, logit_std, gain)
    x = _spread(r, s, T)
    Y2 = np.minimum(np.exp(x) / T, 1.0)
    bracket = np.maximum(Y2 - 2 * np.exp(3 * x) / (T * T) + Y2 * Y2, 0.0)
    agreed = np.exp(r * x)
    values = r_g * agreed + (1 - r_g) * Y2
    queries = (1 - r) * x * (bracket + np.square(1 - Y2) / np.asarray(width, float))
    keys = x * (r * r_g * agreed + (1 - r * r_g) * bracket)
    return np.asarray(g * v * (values + queries + keys))


def attention_backward_covariance(
    gradient: ArrayLike, *, gradient_correlation: ArrayLike, tokens: ArrayLike, gain: ArrayLike = 1.0
) -> Array:
    r"""$g\sigma_g^2[r_g + (1-r_g)/T]$ between tokens, through values; logits' gradients of one query add to 0.

    Args:
        gradient: σ_g².
        gradient_correlation: r_g.
        tokens: T.
        gain: g.

    Returns:
        The covariance.
    """
    v, r_g, T, g = _all(gradient, gradient_correlation, tokens, gain)
    return np.asarray(g * v * (r_g + (1 - r_g) / T))
