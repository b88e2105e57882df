r"""Fuss–Catalan laws: squared singular values of products of n square Gaussian matrices.

With entries of variance 1/size the moments are $m_k = \frac1{nk+1}\binom{nk+k}{k}$ and the upper edge is
$(n+1)^{n+1}/n^n$. mind_the_gap (arXiv 2410.07799) has n = 2ℓ for ℓ layers $X \mapsto (A - J)XW$ on orthonormal tokens,
n = ℓ for $X \mapsto XW$. With T × d factors among them, $\gamma = T/d$, the law is no Fuss–Catalan law any more; its
S-transform is the product of the factors', $(1+z)^{-m}(1+\gamma z)^{-w}$, and edge and moments follow from it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["moment", "rank_share", "rectangular_rank_share", "upper_edge"]

Array = NDArray[np.float64]


def moment(factors: ArrayLike, order: ArrayLike) -> Array:
    r"""$m_k = \frac1{nk+1}\binom{nk+k}{k}$, mean k-th power of the squared singular values.

    Args:
        factors: n ≥ 1; n = 1 gives the Catalan numbers of the Marchenko–Pastur law.
        order: k ≥ 0.

    Returns:
        The moment, 1 or more.
    """
    from scipy.special import binom

    n, k = np.asarray(factors, float), np.asarray(order, float)
    return np.asarray(binom(n * k + k, k) / (n * k + 1))


def upper_edge(factors: ArrayLike) -> Array:
    r"""$(n+1)^{n+1}/n^n$, where the squared singular values end; their mean is 1.

    Args:
        factors: n ≥ 1.

    Returns:
        4 for n = 1, then growing like e·n.
    """
    n = np.asarray(factors, float)
    return np.asarray((n + 1) * np.exp(n * np.log1p(1 / n)))


def rank_share(factors: ArrayLike) -> Array:
    r"""Gram stable rank of a product over its size: $m_2/\text{edge}^2 = (n+1)\,n^{2n}/(n+1)^{2(n+1)}$.

    Args:
        factors: n ≥ 1.

    Returns:
        In (0, 1/8]: .125, .0658, .0445, .0336 for n = 1 … 4, then like 1/(e² n).
    """
    return np.asarray((np.asarray(factors, float) + 1) / np.square(upper_edge(factors)))


def rectangular_rank_share(mixing: ArrayLike, widths: ArrayLike, *, ratio: ArrayLike = 1.0) -> Array:
    r"""The same for m factors T × T, then one T × d and w − 1 factors d × d: $(1 + m + w\gamma)/\text{edge}^2$.

    $\text{edge} = \min_{z>0}(1+z)^{m+1}(1+\gamma z)^w/z$, at the positive root of
    $(m+w)\gamma z^2 + (m + (w-1)\gamma)z = 1$. Derived here from S-transforms; m + w = n at γ = 1.

    Args:
        mixing: m ≥ 0, factors that mix tokens.
        widths: w ≥ 1, factors that mix channels.
        ratio: γ = T/d > 0.

    Returns:
        Gram stable rank over T.
    """
    m, w, gamma = (np.asarray(one, float) for one in (mixing, widths, ratio))
    square, linear = (m + w) * gamma, m + (w - 1) * gamma
    z = 2 / (linear + np.sqrt(linear**2 + 4 * square))
    log_edge = (m + 1) * np.log1p(z) + w * np.log1p(gamma * z) - np.log(z)
    return np.asarray((1 + m + w * gamma) * np.exp(-2 * log_edge))
