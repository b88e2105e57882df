r"""Where tokens stand: classes of positions, and what a uniform average over the keys they see makes of overlaps.

Under full attention all tokens are alike: one class. Under a causal mask a query at position $x T$ averages the prefix
before it, so that early tokens, which see few keys, keep large overlaps for a long way into the prefix of late ones.
Positions are cut at halving shares of the context; overlaps live on pairs of classes. The last class is the later half,
the `late` tokens of `examine`. Sums over positions are integrals, exact up to 1/T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Positions", "positions_of"]

Array = NDArray[np.float64]

_EULER = 0.5772156649015329
_CUTS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Positions:
    """Classes of positions and their unordered pairs, (i, j) with i ≤ j, i before j.

    Attributes:
        share: of the context in each class, (classes,).
        first: i of each pair, (pairs,).
        second: j of each pair, (pairs,).
        prefix: share of the keys that a token of class i sees which lie in class k, (classes, classes).
        average: takes overlaps of pairs to the mean overlap of one key of each one's prefix, (pairs, pairs).
        inverse: mean of 1/n over tokens of a class, n the keys that one sees, (classes, …).
        inverse_pair: mean of 1/n of the later of two tokens, (pairs, …).
    """

    share: Array
    first: NDArray[np.intp]
    second: NDArray[np.intp]
    prefix: Array
    average: Array
    inverse: Array
    inverse_pair: Array

    @property
    def diagonal(self) -> NDArray[np.intp]:
        """Places of the pairs (i, i), (classes,)."""
        return np.flatnonzero(self.first == self.second)


def positions_of(
    *, causal: bool, context: Array, window: Array | None = None, cuts: tuple[float, ...] = _CUTS
) -> Positions:
    """The classes of an attention mask.

    Args:
        causal: whether a query sees the keys up to its own alone; else all of them.
        context: T, of any shape; infinite for the limit.
        window: keys that a query sees at most; classes then are one, and neighbours are not told from others.
        cuts: of the context, for a causal mask.

    Returns:
        Shares and averages, with arrays of the shape of `context` behind the first axis of the last two.
    """
    T = np.asarray(context, dtype=np.float64)
    if window is not None or not causal:
        n = T if window is None else np.minimum(T, np.asarray(window, dtype=np.float64))
        return _one(n, T)
    cuts_ = np.asarray(cuts)
    low, high = cuts_[:-1], cuts_[1:]
    share = high - low
    first, second = np.triu_indices(len(share))
    with np.errstate(divide="ignore"):
        mean_inverse = np.where(low > 0, np.log(high / low) / share, 0.0)  # of x over its class
    prefix = np.tril(np.outer(mean_inverse, share), -1) + np.diag(1 - low * mean_inverse)
    both = np.einsum("ik,jl->ijkl", prefix, prefix)
    both = both + both.swapaxes(2, 3)
    average = both[first, second][:, first, second] / np.where(first == second, 2, 1)
    pairs_inverse = 2 / share**2 * (share - np.where(low > 0, low * np.log(high / np.maximum(low, 1e-9)), 0.0))
    trailing = (slice(None), *(None,) * T.ndim)
    inverse = mean_inverse[trailing] / T
    head = np.maximum(share[0] * T, 1.0)
    inverse[0] = (np.log(head) + _EULER + 0.5 / head) / head if np.isfinite(T).all() else 0.0
    inverse_pair = np.where((first == second)[trailing], (pairs_inverse[first])[trailing] / T, inverse[second])
    return Positions(share, first, second, prefix, average, np.minimum(inverse, 1.0), np.minimum(inverse_pair, 1.0))


def _one(n: Array, T: Array) -> Positions:
    one, zero = np.ones((1, 1)), np.zeros(1, dtype=np.intp)
    apart = np.where(n < T, (1 - n / (3 * T)) / T, 1 / n)  # two windows share few keys
    return Positions(np.ones(1), zero, zero, one, one, (1 / n)[None], apart[None])
