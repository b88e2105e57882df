r"""Spectra of random Markov matrices: an outlier at 1 above a bulk of size 1/√T.

**Assumes** $A_{ts} = D_{ts}/\sum_rD_{tr}$ with independent $D \ge 0$ of bounded density: rows and entries know nothing
of each other, and every query sees every key.

**Symbols.** $T$ `tokens`, $\sigma$ `deviation`, standard deviation over mean of the entries, $s$ `logit_std`, of the
logits within a row, $Y_2 = \mathbb E\sum_sA_{ts}^2 \simeq (1+\sigma^2)/T$, $J = \tfrac1T\mathbf 1\mathbf 1^\top$.

Sources: mind_the_gap (arXiv 2410.07799); Bordenave, Caputo and Chafaï (arXiv 0808.1502) for eigenvalues, Chafaï (arXiv
0709.4678) for singular values, whose law is that of `quarter_circle`. Functions broadcast over arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.theory.random_energy import inverse_participation

__all__ = [
    "deviation_of_logits",
    "deviation_of_moments",
    "differential_edge",
    "differential_eigenvalue",
    "differential_outlier",
    "differential_strength",
    "eigenvalue_edge",
    "energy",
    "outlier",
    "outlier_share",
    "singular_edge",
    "spiked",
]

Array = NDArray[np.float64]


def deviation_of_logits(logit_std: ArrayLike, *, tokens: ArrayLike | None = None) -> Array:
    r"""σ of the softmax of Gaussian logits: $\sqrt{e^{s^2}-1}$, or $\sqrt{TY_2(s,T)-1}$ at finite T.

    The two agree while $s < \sqrt{\log T}/\sqrt2$; beyond, few entries carry the variance and σ² stays below T − 1.

    Args:
        logit_std: s.
        tokens: T; the limit where omitted.

    Returns:
        σ; 1 at s² = ln 2.
    """
    s = np.asarray(logit_std, float)
    if tokens is None:
        with np.errstate(over="ignore"):
            return np.asarray(np.sqrt(np.expm1(s * s)))
    count = np.asarray(tokens, float)
    return np.asarray(np.sqrt(np.maximum(count * inverse_participation(s, count) - 1, 0.0)))


def deviation_of_moments(mean: ArrayLike, variance: ArrayLike) -> Array:
    r"""$\sigma = \sqrt{\mathrm{var}}/m$ of entries before their rows are normalised.

    Args:
        mean: m > 0.
        variance: var.

    Returns:
        σ.
    """
    return np.asarray(np.sqrt(np.asarray(variance, float)) / np.asarray(mean, float))


def eigenvalue_edge(deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$|\lambda_2| \simeq \sigma/\sqrt T$, radius of the disk that all eigenvalues but $\lambda_1 = 1$ fill evenly.

    Also $|\lambda_1(A - J)|$: the gap is closed.

    Args:
        deviation: σ.
        tokens: T.

    Returns:
        The radius.
    """
    return np.asarray(np.asarray(deviation, float) / np.sqrt(np.asarray(tokens, float)))


def singular_edge(deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$s_2(A) \simeq s_1(A - J) \simeq 2\sigma/\sqrt T$, where the quarter circle of the bulk ends.

    Args:
        deviation: σ.
        tokens: T.

    Returns:
        The edge, for `quarter_circle`.
    """
    return 2 * eigenvalue_edge(deviation, tokens=tokens)


def outlier(deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$s_1(A) = (1 - \sigma^2/T)^{-1/2}$, which is $1 + \sigma^2/2T$ to first order; $\lambda_1 = 1$ exactly.

    $B = A - J$ has $B\mathbf 1 = 0$, so that $AA^\top = J + BB^\top$: a spike of size 1 on a Marchenko–Pastur law of
    mean $\tau^2 = \sigma^2/T$, which goes to $1 + \tau^2/(1-\tau^2)$. Derived here.

    Args:
        deviation: σ, with σ² < T/2 (beyond, the spike drowns in the bulk).
        tokens: T.

    Returns:
        s₁, 1 or more; infinite for σ² ≥ T.
    """
    share = np.square(np.asarray(deviation, float)) / np.asarray(tokens, float)
    with np.errstate(divide="ignore"):
        return np.asarray(1 / np.sqrt(np.maximum(1 - share, 0.0)))


def energy(deviation: ArrayLike, *, centred: bool = False) -> Array:
    r"""$\|A\|_F^2 \to 1 + \sigma^2$, and $\|A - J\|_F^2 \to \sigma^2$.

    Args:
        deviation: σ.
        centred: without the outlier.

    Returns:
        The squared Frobenius norm.
    """
    return np.asarray(np.square(np.asarray(deviation, float)) + (0.0 if centred else 1.0))


def outlier_share(deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$s_1^2/\|A\|_F^2 \simeq 1/(1+\sigma^2)$, the outlier's share of the map's energy.

    Args:
        deviation: σ.
        tokens: T.

    Returns:
        In (0, 1].
    """
    return np.asarray(np.square(outlier(deviation, tokens=tokens)) / energy(deviation))


# ------------------------------------------------------------ differential attention


def differential_eigenvalue(strength: ArrayLike) -> Array:
    r"""$1 - \lambda$, the outlier eigenvalue and row sum of differential attention $A_1 - \lambda A_2$, exactly.

    Source: arXiv 2410.05258 for the layer, the spectrum derived from the model of this file.

    Args:
        strength: λ.

    Returns:
        The eigenvalue; 0 at λ = 1, where differential attention is centred.
    """
    return np.asarray(1 - np.asarray(strength, float))


def differential_strength(layer: ArrayLike) -> Array:
    r"""$\lambda_{init}(l) = 0.8 - 0.6e^{-0.3l}$, with which the layers of differential transformers begin.

    Early layers keep most of the outlier, deep ones little. Source: arXiv 2410.05258.

    Args:
        layer: l, from 0.

    Returns:
        λ, from 0.2 to 0.8.
    """
    return np.asarray(0.8 - 0.6 * np.exp(-0.3 * np.asarray(layer, float)))


def differential_edge(strength: ArrayLike, deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$2\sigma\sqrt{1+\lambda^2}/\sqrt T$, the bulk's edge of $A_1 - \lambda A_2$ with independent maps.

    Args:
        strength: λ.
        deviation: σ of both maps.
        tokens: T.

    Returns:
        The edge.
    """
    return np.asarray(np.hypot(1.0, np.asarray(strength, float)) * singular_edge(deviation, tokens=tokens))


def differential_outlier(strength: ArrayLike, deviation: ArrayLike, *, tokens: ArrayLike) -> Array:
    r"""$s_1(A_1 - \lambda A_2)$: $s_1^2 = \theta^2 + \tau^2/(1 - \tau^2/\theta^2)$ above the bulk, else its edge.

    $\theta = 1 - \lambda$ and $\tau^2 = (1+\lambda^2)\sigma^2/T$; the outlier stands out while $\theta^2 > 2\tau^2$.

    Args:
        strength: λ.
        deviation: σ of both maps.
        tokens: T.

    Returns:
        s₁.
    """
    theta = np.square(differential_eigenvalue(strength))
    tau = np.square(differential_edge(strength, deviation, tokens=tokens)) / 4
    return np.asarray(np.sqrt(spiked(theta, tau)))


def spiked(spike: ArrayLike, bulk: ArrayLike) -> Array:
    r"""Largest eigenvalue of a spike $\theta^2$ on a Marchenko–Pastur law of mean $\tau^2$, free of each other.

    $\theta^2 + \tau^2/(1-\tau^2/\theta^2)$ for $\theta^2 > 2\tau^2$, else the edge $4\tau^2$.

    Args:
        spike: θ².
        bulk: τ².

    Returns:
        The squared singular value.
    """
    theta, tau = np.broadcast_arrays(np.asarray(spike, float), np.asarray(bulk, float))
    above = theta > 2 * tau
    safe = np.where(above, theta, 1.0)
    return np.asarray(np.where(above, safe + tau / (1 - np.where(above, tau, 0.0) / safe), 4 * tau))
