r"""How far the singular values of a real attention map are from those of a random Markov matrix.

The map has its outlier taken off, and what is left is laid over the law of the bulk with σ from its own second moment,
$\sigma^2 = \sum_is_i^2$ of what is left: no parameter is fitted to the shape, and column preferences that all rows
share, which are in the outlier, do not count against the model. Two distances of the values: Kolmogorov's,
$\sup_s|F_n(s) - F(s)|$ in [0, 1], and Wasserstein's, $\int|F_n - F|\,ds$ over the edge. True random Markov matrices at
that T and σ are at the distances of `null_distances`: what lies beyond their largest is no scatter. mind_the_gap
(arXiv 2410.07799) assumes the law; here it is tested.

Full attention has the quarter circle. Of causal attention the late rows (t > T/2) of $A - U$ are looked at, U the
running mean; their law has no closed form and is that of many random matrices, `late_law`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError
from fullrank.theory import quarter_circle

__all__ = [
    "BulkDistance",
    "Law",
    "bulk_distance",
    "bulk_values",
    "late_law",
    "null_distances",
    "random_maps",
    "row_excess",
]

Array = NDArray[np.float64]
_NODES = 2001
Law = Callable[[Array, Array], Array]


class BulkDistance(NamedTuple):
    r"""Distances between a bulk and its law, each of the leading shape of what was given.

    Attributes:
        kolmogorov: largest difference of the distribution functions, in [0, 1].
        wasserstein: area between the distribution functions, in units of the edge.
        edge: of the quarter circle with that second moment, $2\sigma/\sqrt T$.
        largest: the bulk's largest singular value over that edge; 1 for full attention in the model.
    """

    kolmogorov: Array
    wasserstein: Array
    edge: Array
    largest: Array


def bulk_values(attention: ArrayLike, *, causal: bool = False) -> Array:
    """Singular values of the map without its leading direction, rising.

    Args:
        attention: (…, T, T), rows of probabilities.
        causal: whether queries see no later key: then those of the late rows of A − U.

    Returns:
        (…, T − 1); for causal maps (…, T − ⌊T/2⌋).

    Raises:
        TheoryError: for what is no square map, or no finite one.
    """
    A = _map(attention)
    if causal:
        return np.asarray(np.linalg.svd(_late(A), compute_uv=False)[..., ::-1])
    return np.asarray(np.linalg.svd(A, compute_uv=False)[..., :0:-1])


def row_excess(attention: ArrayLike, *, causal: bool = False) -> Array:
    r"""$Y_2 - 1/T$, mean energy of what a row has beyond plain averaging; σ²/T in the model.

    Args:
        attention: (…, T, T), rows of probabilities.
        causal: over late rows t, of $\sum_sA_{ts}^2 - 1/t$; (2 ln 2) σ²/T in the model.

    Returns:
        One number per map.

    Raises:
        TheoryError: for what is no square map, or no finite one.
    """
    A = _map(attention)
    part = _late(A) if causal else A - 1 / A.shape[-1]
    return np.asarray(np.square(part).sum((-2, -1)) / part.shape[-2])


def _map(attention: ArrayLike) -> Array:
    A = np.asarray(attention, float)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] < 3 or not np.all(np.isfinite(A)):
        raise TheoryError(f"attention= must be finite square maps of 3 tokens or more, and has the shape {A.shape}.")
    return A


def _late(A: Array) -> Array:
    count = A.shape[-1]
    return np.asarray((A - np.tri(count) / np.arange(1, count + 1)[:, None])[..., count // 2 :, :])


def bulk_distance(values: ArrayLike, excess: ArrayLike | None = None, *, law: Law | None = None) -> BulkDistance:
    r"""Distance of a bulk from the quarter circle with edge $2\sigma/\sqrt T$, or from another law.

    Args:
        values: (…, n) singular values of the bulk, in any order.
        excess: (…) σ²/T; by default the mean square of the values, else for example `row_excess` of the map.
        law: distribution function of (s, that edge); by default `quarter_circle.cdf`.

    Returns:
        The distances.

    Raises:
        TheoryError: where there is no bulk, as for attention that is exactly uniform.
    """
    s = np.sort(np.asarray(values, float), -1)
    count = s.shape[-1]
    energy = np.asarray(np.square(s).mean(-1) if excess is None else excess, float)
    if not np.all(energy > 0):
        raise TheoryError("the second moment of a bulk must be above 0: attention that is uniform has no bulk.")
    edge = 2 * np.sqrt(energy)
    of_law = law or (lambda place, at: quarter_circle.cdf(place, edge=at))
    F = of_law(s, edge[..., None])
    steps = np.arange(count + 1) / count
    kolmogorov = np.max(np.maximum(steps[1:] - F, F - steps[:-1]), -1)
    nodes = np.linspace(0.0, max(2.0, 1.01 * float(np.max(s[..., -1] / edge))), _NODES)
    areas = [
        np.trapezoid(np.abs(np.searchsorted(row, nodes * at, side="right") / count - of_law(nodes * at, at)), nodes)
        for row, at in zip(s.reshape(-1, count), edge.reshape(-1), strict=True)
    ]
    return BulkDistance(np.asarray(kolmogorov), np.asarray(areas).reshape(edge.shape), edge, s[..., -1] / edge)


def random_maps(tokens: int, logit_std: float, *, draws: int, seed: int, causal: bool) -> Array:
    """Softmax of independent Gaussian logits, (draws, T, T)."""
    weights = np.exp(np.random.default_rng(seed).normal(0.0, logit_std, (draws, tokens, tokens)))
    if causal:
        weights = np.tril(weights)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def late_law(tokens: int, logit_std: float, *, draws: int = 20, seed: int = 1) -> Law:
    """Law of the bulk of late rows of causal random Markov matrices: pooled values over their own edges.

    Args:
        tokens: T.
        logit_std: s of the logits within a row.
        draws: how many matrices are pooled.
        seed: of their own generator.

    Returns:
        For `bulk_distance`.
    """
    maps = random_maps(tokens, logit_std, draws=draws, seed=seed, causal=True)
    values = bulk_values(maps, causal=True)
    edges = 2 * np.sqrt(np.square(values).mean(-1))
    pooled = np.sort((values / edges[:, None]).ravel())
    shares = (np.arange(pooled.size) + 0.5) / pooled.size
    return lambda place, at: np.asarray(np.interp(place / at, pooled, shares, left=0.0, right=1.0))


def null_distances(
    tokens: int, logit_std: float, *, causal: bool = False, law: Law | None = None, draws: int = 20, seed: int = 0
) -> BulkDistance:
    """The distances of true random Markov matrices, softmax of independent Gaussian logits, from the law.

    They shrink about like 1/T: singular values repel each other, so that hardly any scatter is left. For logits beyond
    √(log T / 2) a few entries carry the variance and the null itself leaves the quarter circle.

    Args:
        tokens: T.
        logit_std: s of the logits within a row.
        causal: of late rows of causal matrices.
        law: as in `bulk_distance`; for causal ones by default `late_law`.
        draws: how many matrices.
        seed: of their own generator.

    Returns:
        Distances of the shape (draws,), the criterion being their largest.
    """
    if causal and law is None:
        law = late_law(tokens, logit_std, seed=seed + 1)
    maps = random_maps(tokens, logit_std, draws=draws, seed=seed, causal=causal)
    return bulk_distance(bulk_values(maps, causal=causal), law=law)
