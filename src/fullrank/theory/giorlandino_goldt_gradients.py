r"""Gradients of queries, keys and values at initialisation, below and above the transition.

giorlandino_goldt (arXiv 2505.24333), Result 2, derived again: with upstream gradients independent between tokens the
bracket is $\mathbb E[Y_2 - 2Y_3 + Y_2^2]$, for $\delta_{ts} = A_{ts}\,g_t\cdot(v_s - o_t)$ sums to 0 over s. As
T → ∞ it is $m(1-m)/3$, $m = \beta_c/\beta$, above $\beta_c$ and 0 below: in the phase of rank collapse queries and keys
have no gradient. At finite T and width it starts at uniform attention's $1/T + 1/d$.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.theory import random_energy

__all__ = ["gradient_bracket", "gradient_bracket_limit", "query_gradient", "value_gradient"]

Array = NDArray[np.float64]


def gradient_bracket(s: ArrayLike, keys: ArrayLike, *, width: ArrayLike = math.inf) -> Array:
    r"""$\mathbb E[Y_2 - 2Y_3 + Y_2^2] + \mathbb E(1-Y_2)^2/d$ of rows of n iid logits of standard deviation s.

    The first is the paper's, for tokens of equal overlaps. The second, derived here, is what their fluctuations add:
    values and keys are read off the same tokens, so that along one direction of d the changes of all keys agree. With
    it uniform attention has $(1-1/n)/n + (1-1/n)^2/d$, the $T + d$ of Noci et al. (arXiv 2206.03126). By quadrature.

    Args:
        s: standard deviation of the logits within a row, $\beta\sqrt{q(q-p)\log T}$.
        keys: n.
        width: d; infinite for the first alone.

    Returns:
        The bracket, of the broadcast shape.
    """
    Y2, Y3 = (random_energy.participation_moment(order, s, keys) for order in (2, 3))
    squared = random_energy.participation_variance_moment(s, keys)
    return np.asarray(Y2 - 2 * Y3 + squared + (1 - 2 * Y2 + squared) / np.asarray(width, dtype=np.float64))


def gradient_bracket_limit(b: ArrayLike) -> Array:
    r"""$m(1-m)/3$ with $m = \sqrt2/b$ above the transition, 0 below: the bracket as T → ∞.

    Args:
        b: gauge, $\beta\sqrt{q(q-p)}$.

    Returns:
        The bracket, in [0, 1/12].
    """
    m = np.minimum(1.0, random_energy.TRANSITION / np.maximum(np.asarray(b, dtype=np.float64), 1e-300))
    return np.asarray(m * (1 - m) / 3)


def query_gradient(
    q: ArrayLike,
    p: ArrayLike,
    bracket: ArrayLike,
    *,
    tokens: ArrayLike,
    width: ArrayLike,
    std_key: ArrayLike,
    std_value: ArrayLike,
    head_width: ArrayLike | None = None,
    logit_scale: ArrayLike | None = None,
    upstream: ArrayLike = 1.0,
) -> Array:
    r"""$\mathbb E\|\partial\mathcal L/\partial W_Q\|_F^2$ of one head.

    $T\,dq\,\tau^2\,d_hd\sigma_K^2(q-p)\,d_hd\sigma_V^2(q-p)\,g^2$ times the bracket; for $W_K$ put $\sigma_Q$ for
    $\sigma_K$. With one head of width d, $\tau = d^{-1/2}$ and $\sigma_K^2 = \sigma_a/d$ it is
    $Td^2g^2\sigma_v^2\sigma_aq(q-p)^2$ times the bracket (arXiv 2505.24333, Result 2; of the bracket see above).
    Vanishes where tokens agree (q = p).

    Args:
        q: mean square of the entries of a token that attention reads.
        p: mean product of the entries of two tokens.
        bracket: `gradient_bracket` or its limit.
        tokens: T.
        width: d.
        std_key: σ_K, of the entries of W_K.
        std_value: σ_V.
        head_width: d_h; by default d.
        logit_scale: τ; by default 1/√d_h.
        upstream: g², variance of the entries of the gradient of the loss by the head's output.

    Returns:
        Mean squared Frobenius norm, of the broadcast shape.
    """
    q, p, d, T, g2, bracket = (_array(one) for one in (q, p, width, tokens, upstream, bracket))
    d_h = d if head_width is None else _array(head_width)
    tau = d_h**-0.5 if logit_scale is None else _array(logit_scale)
    keys, values = (d_h * d * np.square(_array(one)) * (q - p) for one in (std_key, std_value))
    return np.asarray(T * d * q * np.square(tau) * keys * values * g2 * bracket)


def value_gradient(
    q: ArrayLike,
    p: ArrayLike,
    Y2: ArrayLike,
    *,
    tokens: ArrayLike,
    width: ArrayLike,
    head_width: ArrayLike | None = None,
    upstream: ArrayLike = 1.0,
) -> Array:
    r"""$\mathbb E\|\partial\mathcal L/\partial W_V\|_F^2 = T\,d_hd\,g^2\,[p + (q-p)Y_2]$ of one head: grows with p.

    Args:
        q: mean square of the entries of a token that attention reads.
        p: mean product of the entries of two tokens.
        Y2: of attention's rows.
        tokens: T.
        width: d.
        head_width: d_h; by default d.
        upstream: g², as in `query_gradient`.

    Returns:
        Mean squared Frobenius norm, of the broadcast shape.
    """
    q, p, Y2, d, T, g2 = (_array(one) for one in (q, p, Y2, width, tokens, upstream))
    d_h = d if head_width is None else _array(head_width)
    return np.asarray(T * d_h * d * g2 * (p + (q - p) * Y2))


def _array(value: ArrayLike) -> Array:
    return np.asarray(value, dtype=np.float64)
