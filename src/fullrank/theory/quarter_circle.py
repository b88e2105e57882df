r"""The quarter-circle law, of the singular values of a square matrix of independent entries.

For $n \times n$ entries of mean 0 and variance $v$ the singular values lie on $[0, e]$, $e = 2\sqrt{nv}$, with density
$p(s) = \frac{4}{\pi e^2}\sqrt{e^2 - s^2}$ and mean square $e^2/4$. For the bulk of a random Markov matrix
$e = 2\sigma/\sqrt T$ (Chafaï, arXiv 0709.4678; mind_the_gap, arXiv 2410.07799).

Every function broadcasts; `edge` is e > 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["cdf", "density", "quantile"]

Array = NDArray[np.float64]

_HALVINGS = 60


def density(s: ArrayLike, *, edge: ArrayLike = 1.0) -> Array:
    r"""$p(s) = \frac{4}{\pi e^2}\sqrt{e^2 - s^2}$, 0 outside of [0, e].

    Args:
        s: where.
        edge: e.

    Returns:
        Per unit of s; times T it is the count of singular values that a histogram is laid under.
    """
    place, e = np.asarray(s, float), np.asarray(edge, float)
    inside = (place >= 0) & (place <= e)
    return np.asarray(np.where(inside, 4 / (np.pi * e**2) * np.sqrt(np.maximum(e**2 - place**2, 0.0)), 0.0))


def cdf(s: ArrayLike, *, edge: ArrayLike = 1.0) -> Array:
    r"""$F(s) = \frac2\pi\left(u\sqrt{1-u^2} + \arcsin u\right)$, $u = s/e$.

    Args:
        s: where.
        edge: e.

    Returns:
        The share of singular values up to s, in [0, 1].
    """
    u = np.clip(np.asarray(s, float) / np.asarray(edge, float), 0.0, 1.0)
    return np.asarray(2 / np.pi * (u * np.sqrt(1 - u * u) + np.arcsin(u)))


def quantile(share: ArrayLike, *, edge: ArrayLike = 1.0) -> Array:
    r"""The s with $F(s)$ = `share`, by bisection: $u = \sin\varphi$, $2\varphi + \sin2\varphi = \pi F$.

    The k-th of n singular values in rising order, from 0, is laid over `quantile((k + ½)/n)`.

    Args:
        share: in [0, 1].
        edge: e.

    Returns:
        In [0, e], within 1e-16 e.
    """
    wanted = np.pi * np.clip(np.asarray(share, float), 0.0, 1.0)
    low, high = np.zeros_like(wanted), np.full_like(wanted, np.pi / 2)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = 2 * middle + np.sin(2 * middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.sin((low + high) / 2) * np.asarray(edge, float))
