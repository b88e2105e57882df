r"""How fast an elementwise activation moves: $\mathbb E[\varphi'(\sqrt q z)^2]$ of a standard Gaussian z.

What multiplies the difference between two nearly equal tokens, and a gradient on its way back, at a wide layer whose
pre-activations have variance q. Arrays broadcast, float64 in and out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError
from fullrank.theory.activations import ACTIVATIONS

__all__ = ["mean_square_slope"]

Array = NDArray[np.float64]

_NODES, _FEW = 161, 1024


def mean_square_slope(activation: str, q: ArrayLike) -> Array:
    r"""$\mathbb E[\varphi'(\sqrt q z)^2]$.

    1 for the identity, 1/2 for ReLU; for GELU, SiLU and tanh the trapezoidal rule in t with
    $z = w\sinh t$, $w = \min(1, q^{-1/2})$, which resolves both the bend at 0 and the tails (error below 1e-10 up to
    q = 1e6).

    Args:
        activation: of `ACTIVATIONS`.
        q: variance, ≥ 0.

    Returns:
        The expectation, of the shape of `q`.

    Raises:
        TheoryError: for an activation whose slope is not known.
    """
    q = np.asarray(q, dtype=np.float64)
    if activation == "identity":
        return np.ones_like(q)
    if activation == "relu":
        return np.full_like(q, 0.5)
    if activation not in ACTIVATIONS:
        raise TheoryError(f"activation={activation!r} has no slope here: there are {', '.join(ACTIVATIONS)}.")
    w = 1 / np.sqrt(np.maximum(q, 1.0))
    reach = np.arcsinh(9 / w)
    total = np.zeros_like(q)
    for x in np.array_split(np.linspace(-1, 1, _NODES), 1 if q.size <= _FEW else _NODES):
        t = np.multiply.outer(x, reach)
        z = w * np.sinh(t)
        density = np.exp(-z * z / 2) * w * np.cosh(t)
        total = total + (density * np.square(_slope(activation, np.sqrt(q) * z))).sum(0)
    return np.asarray(total * reach * (2 / (_NODES - 1)) / math.sqrt(2 * math.pi))


def _slope(activation: str, u: Array) -> Array:
    if activation == "tanh":
        return np.asarray(1 - np.square(np.tanh(u)))
    if activation == "silu":
        gate = 0.5 * (1 + np.tanh(u / 2))
        return np.asarray(gate * (1 + u * (1 - gate)))
    from scipy.special import ndtr

    return np.asarray(ndtr(u) + u * np.exp(-u * u / 2) / math.sqrt(2 * math.pi))
