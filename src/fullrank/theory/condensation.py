r"""Condensation (arXiv 2510.06954): training from small weights, its two stages and when they begin.

**Assumes** one layer $f(X) = \tanh(\mathrm{softmax}(x_s W_Q W_K^\top X^\top/\sqrt d)\,X W_V W_1)\,W_2$ of the last
token $x_s$, without skip or norm, the loss $\tfrac1n\sum_i e^{-y_i f(X_i)}$, and weights so small that tanh is linear
and attention uniform; in the second stage values and readout stand still.

**Symbols.** $n$ sequences of $s$ tokens of width $d$ in `tokens` of shape (n, s, d), $y$ `labels` (±1),
$r = W_V W_1 W_2$ `readout` of shape (d,), $F$ `data_matrix`, $\delta$ the size of $W_Q, W_K$ when the plateau begins.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "activation_time",
    "data_matrix",
    "escape_bound",
    "first_stage_direction",
    "first_stage_energy",
    "second_stage",
    "second_stage_limit",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ first stage


def first_stage_direction(tokens: ArrayLike, labels: ArrayLike) -> tuple[Array, float]:
    r"""$v \propto \sum_i y_i \sum_j X_{ij}$, onto which the columns of $W_V$ condense, and the length before it is 1.

    Args:
        tokens: X, of shape (n, s, d).
        labels: y, of shape (n,).

    Returns:
        v of shape (d,), and the length, which sets the clock: $t' = \varepsilon\,\text{length}\,t/(ns)$.
    """
    drawn = np.einsum("n,nsd->d", np.asarray(labels, float), np.asarray(tokens, float))
    length = float(np.linalg.norm(drawn))
    return np.asarray(drawn / length if length else drawn), length


def first_stage_energy(direction: ArrayLike, W_V: ArrayLike, W_1: ArrayLike, W_2: ArrayLike) -> float:
    r"""$E = v\,W_V W_1 W_2$, which the first stage raises: $\dot E \ge 3E^{4/3}$ where it is positive."""
    return float(
        np.asarray(direction, float) @ np.asarray(W_V, float) @ np.asarray(W_1, float) @ np.asarray(W_2, float)
    )


def escape_bound(energy: ArrayLike) -> Array:
    r"""$T^* \le E(0)^{-1/3}$: the first stage blows up by then, in its own clock, for weights of unit size.

    Args:
        energy: E(0).

    Returns:
        The bound; infinite where E(0) is not positive: it first rises through 0, and nothing is said of when.
    """
    begun = np.asarray(energy, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(begun > 0, np.abs(begun) ** (-1 / 3), np.inf))


# ------------------------------------------------------------ second stage


def data_matrix(tokens: ArrayLike, labels: ArrayLike, readout: ArrayLike) -> Array:
    r"""$F$ of $\dot W_Q = F W_K$, $\dot W_K = F^\top W_Q$: what moves queries and keys once values have condensed.

    $F = \frac1{n\sqrt d}\sum_i y_i\,e^{-y_i \bar x_i r}\; x_{i,s}^\top\, r^\top \mathrm{Cov}_i$ with the covariance
    $\mathrm{Cov}_i$ of a sequence's tokens: where they are alike, it moves nothing.

    Args:
        tokens: X, of shape (n, s, d).
        labels: y, of shape (n,).
        readout: r, of shape (d,).

    Returns:
        F, of shape (d, d); its largest singular value is the rate at which a plateau ends.
    """
    x, y, r = (np.asarray(one, float) for one in (tokens, labels, readout))
    centred = x - x.mean(1, keepdims=True)
    weight = y * np.exp(-y * (x.mean(1) @ r))
    pulled = np.einsum("d,nsd,nse->ne", r, centred, x) / x.shape[1]
    return np.asarray(np.einsum("n,nd,ne->de", weight, x[:, -1], pulled) / (len(x) * math.sqrt(x.shape[2])))


def second_stage(data: ArrayLike, W_Q: ArrayLike, W_K: ArrayLike, time: float) -> tuple[Array, Array]:
    r"""The solution of $\dot W_Q = F W_K$, $\dot W_K = F^\top W_Q$, exactly.

    With $F = U\Sigma V^\top$: $W_Q(t) = U[\cosh(\Sigma t)U^\top W_Q + \sinh(\Sigma t)V^\top W_K]$, and $W_K$ with U
    and V exchanged.

    Args:
        data: F, of shape (d, d).
        W_Q: at t = 0, of shape (d, m).
        W_K: at t = 0, of shape (d, m).
        time: t.

    Returns:
        Both at t.
    """
    U, sigma, Vt = np.linalg.svd(np.asarray(data, float))
    query, key = U.T @ np.asarray(W_Q, float), Vt @ np.asarray(W_K, float)
    even, odd = np.cosh(sigma * time)[:, None], np.sinh(sigma * time)[:, None]
    return np.asarray(U @ (even * query + odd * key)), np.asarray(Vt.T @ (even * key + odd * query))


def second_stage_limit(data: ArrayLike, W_Q: ArrayLike, W_K: ArrayLike) -> tuple[Array, Array, Array]:
    r"""$W_Q \to u_1 p^\top$, $W_K \to v_1 p^\top$ up to growth, with $p = \tfrac12(W_Q^\top u_1 + W_K^\top v_1)$.

    Args:
        data: F, whose largest singular value is simple.
        W_Q: at the start.
        W_K: at the start.

    Returns:
        u₁, v₁ and p: both matrices end with rank one, at the rate $e^{-(\sigma_1 - \sigma_2)t}$.
    """
    U, _, Vt = np.linalg.svd(np.asarray(data, float))
    return U[:, 0], Vt[0], np.asarray((np.asarray(W_Q, float).T @ U[:, 0] + np.asarray(W_K, float).T @ Vt[0]) / 2)


def activation_time(data: ArrayLike, *, size: ArrayLike, wanted: ArrayLike = 1.0) -> Array:
    r"""$\log(\text{wanted}/\delta)/\sigma_1(F)$: when queries and keys of size δ have grown to the size `wanted`.

    Args:
        data: F.
        size: δ.
        wanted: size at which attention is felt.

    Returns:
        Time on the gradient flow's clock, where it counts from the end of the first stage; infinite for F = 0.
    """
    rate = float(np.linalg.norm(np.asarray(data, float), 2))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.asarray(wanted, float) / np.asarray(size, float)) / rate)
