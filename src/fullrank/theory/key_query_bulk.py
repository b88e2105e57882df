r"""The bulk of attention whose logits come from keys and queries of few channels, where rows are not independent.

$A - J \simeq \tfrac1T(L + N)$ with $L = QK^\top/\sqrt{d_h}$ of rank $d_h$ and $N$ what the exponential adds to it,
which is uncorrelated with $L$. Per row $L$ carries the energy $s^2/T$ and $N$ the rest of $\sigma^2/T$,
$\sigma^2 = e^{s^2} - 1$: the smaller the logits and the longer the context, the fewer directions the bulk has. Random
Markov matrices (`mind_the_gap_spectra`) are the limit $d_h \gg T$; for $T \gg d_h$ the edge stays near $s/\sqrt{d_h}$
instead of falling like $1/\sqrt T$.

With $y = d_h/T$, $\kappa^2$ = `linear`$/y$, $v$ = `rest` and $t = \kappa g$, free addition of $N$ (R-transform $vg$) to
the product of two Gaussian matrices gives the symmetrised resolvent $g(x)$:
$$x = \frac\kappa t\left(1 + \frac{y\,t^2}{1-t^2}\right) + \frac{v\,t}\kappa.$$
Derived here; the random-matrix part is that of products (S-transform) and sums (R-transform) of free matrices, tokens
are taken as wide beside $d_h$.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["key_query_cdf", "key_query_density", "key_query_edge", "key_query_stable_rank"]

Array = NDArray[np.float64]

_SECTIONS = 60
_GOLDEN = (5**0.5 - 1) / 2
_NODES = 1500


def key_query_edge(linear: ArrayLike, rest: ArrayLike, *, ratio: ArrayLike, narrowing: ArrayLike = 0.0) -> Array:
    r"""Where the bulk ends: the minimum over $z = t^2/(1-t^2) > 0$ of $x_L + v\,g$.

    $x_L = \kappa\sqrt{(1+z)/z}\,(1+yz)(1+wz)$ and $g = (1+yz)/x_L$; w = 0 gives the formula above.

    Args:
        linear: energy per row of the logits' own part, $s^2/T$ (times 1 − r where rows' logits share r).
        rest: energy per row of what the exponential adds, $(e^{s^2} - 1 - s^2)/T$.
        ratio: y = d_h/T > 0.
        narrowing: w = d_h/d, of tokens of d independent channels that are read by random W_Q and W_K.

    Returns:
        The largest singular value: $2\sqrt{\text{linear} + \text{rest}}$ for y → ∞, 0 where both are 0.
    """
    energy, v, y, w = np.broadcast_arrays(*(np.asarray(one, float) for one in (linear, rest, ratio, narrowing)))
    kappa = np.sqrt(np.maximum(energy, np.maximum(1e-10 * v, 1e-300)) / y)  # a floor keeps z within reach

    def place(log_z: Array) -> Array:
        z = np.exp(log_z)
        wide = kappa * np.sqrt((1 + z) / z) * (1 + w * z)
        return np.asarray(wide * (1 + y * z) + v / wide)

    low, high = np.full(y.shape, -80.0), np.full(y.shape, 30.0)
    for _ in range(_SECTIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        rises = place(left) < place(right)
        low, high = np.where(rises, low, left), np.where(rises, right, high)
    return place((low + high) / 2)


def key_query_density(s: ArrayLike, linear: float, rest: float, *, ratio: float) -> Array:
    r"""Density of the bulk's singular values, $\tfrac{2}{\pi\kappa}\,\mathrm{Im}\,t(s)$ at the quartic's complex root.

    Args:
        s: where, above 0.
        linear: as in `key_query_edge`, above 0.
        rest: as there; 0 leaves a share 1 − y of the singular values at 0, which is no density.
        ratio: y.

    Returns:
        Per unit of s, of the shape of `s`.
    """
    x = np.asarray(s, float)
    kappa, v = (linear / ratio) ** 0.5, rest
    # x t (1 − t²) = κ (1 − t² + y t²) + (v/κ) t² (1 − t²)
    tail = np.broadcast_to(v / kappa, x.shape)
    terms = np.stack([-tail, x, kappa * (ratio - 1) + tail, -x, np.full(x.shape, kappa)], -1)
    return np.asarray(2 / (np.pi * kappa) * np.max(_roots(terms).imag, -1))


def key_query_cdf(s: ArrayLike, linear: float, rest: float, *, ratio: float) -> Array:
    r"""Share of the bulk's singular values up to s, by trapezoids over the density from the edge down.

    Args:
        s: where.
        linear: as in `key_query_edge`, above 0.
        rest: as there.
        ratio: y.

    Returns:
        In [0, 1]; what lies at or near 0 for few channels is counted there.
    """
    edge = float(key_query_edge(linear, rest, ratio=ratio))
    nodes = edge * np.square(np.sin(np.linspace(1e-4, 1, _NODES) * np.pi / 2))  # dense at both ends
    p = key_query_density(nodes, linear, rest, ratio=ratio)
    above = np.concatenate([[0.0], np.cumsum(((p[1:] + p[:-1]) / 2 * np.diff(nodes))[::-1])])[::-1]
    return np.asarray(np.clip(1 - np.interp(np.asarray(s, float), nodes, above, right=0.0), 0.0, 1.0))


def key_query_stable_rank(linear: ArrayLike, rest: ArrayLike, *, tokens: ArrayLike, ratio: ArrayLike) -> Array:
    r"""Gram stable rank of $(A - J)XW$, $XX^\top = I$, square Gaussian W, for key–query maps: again in proportion to T.

    The bulk's moments are $m_2 = \text{linear} + \text{rest}$ and $m_4 = \text{linear}^2/y + 2m_2^2$, the product's
    edge is $\min_x x^3g(x)$ over x above the bulk, and $\mathrm{sr} = T(m_4 + m_2^2)/\text{edge}^2$.

    Args:
        linear: as in `key_query_edge`.
        rest: as there.
        tokens: T.
        ratio: y.

    Returns:
        The gram stable rank; below that of independent rows, `mind_the_gap.stable_rank_centred`.
    """
    energy, v, y = np.broadcast_arrays(*(np.asarray(one, float) for one in (linear, rest, ratio)))
    kappa = np.sqrt(energy / y)
    z = np.geomspace(1e-6, 1e3, 4000).reshape(-1, *(1,) * y.ndim)
    wide = kappa * np.sqrt((1 + z) / z)
    x = wide * (1 + y * z) + v / wide
    # x falls with z down to the bulk's edge; places beyond that are none of the resolvent's
    edge = np.min(np.where(np.minimum.accumulate(x) == x, x**3 / wide, np.inf), 0)
    total = np.square(energy + v)
    return np.asarray(np.asarray(tokens, float) * (np.square(energy) / y + 3 * total) / edge**2)


def _roots(terms: Array) -> Array:
    """Roots of polynomials along the last axis, highest power first; a leading 0 lowers the degree."""
    while np.all(np.abs(terms[..., 0]) <= 1e-12 * np.max(np.abs(terms), -1)):
        terms = terms[..., 1:]
    degree = terms.shape[-1] - 1
    companion = np.zeros((*terms.shape[:-1], degree, degree))
    companion[..., 0, :] = -terms[..., 1:] / terms[..., :1]
    companion[..., range(1, degree), range(degree - 1)] = 1
    return np.asarray(np.linalg.eigvals(companion))
