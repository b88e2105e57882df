r"""Powers of uniform causal attention: what J, J², … leave of tokens that differ, and of gradients.

$J_{ts} = 1/t$ for $s \le t$ (the Cesàro average). Of independent gradients at T tokens, $\|J^k\|_F^2/T$ is what arrives
at all tokens, in units of what left; uniform attention without a mask has 1/T for every k ≥ 1, the causal one more, and
more for every power, for the first tokens gather.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shares", "causal_shares"]

Array = NDArray[np.float64]

_SINGLE, _GROWTH = 64, 1.03


class Shares(NamedTuple):
    r"""For k = 0 … orders, each of shape (orders + 1,), 1 at k = 0.

    Attributes:
        gradients: $\|J^k\|_F^2/T$: of independent gradients, what comes back.
        gradients_late: the same of what comes back to the later half of the tokens alone, per late token.
        deviations: of tokens with independent deviations, what mean square deviation from their mean $J^k$ leaves.
        deviations_late: the same among the later half of the tokens.
    """

    gradients: Array
    gradients_late: Array
    deviations: Array
    deviations_late: Array


@functools.lru_cache(maxsize=64)
def causal_shares(tokens: int, orders: int) -> Shares:
    r"""What powers of $J$ leave, of what comes forward and of what goes back.

    Positions beyond the first 64 are taken together in bins that grow by 3 %: within 3 % of the full matrices, where
    a share is above 1e-4.

    Args:
        tokens: T ≥ 2.
        orders: the largest power.

    Returns:
        The shares.
    """
    edges = _edges(tokens)
    first, size = edges[:-1], np.diff(edges).astype(np.float64)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, tokens + 1))])
    inverse = (harmonic[edges[1:]] - harmonic[edges[:-1]]) / size  # mean of 1/t over a bin
    own = 1 - first * inverse  # mean of (t − first)/t
    average = np.tril(np.outer(inverse, size), -1) + np.diag(own)
    late = first >= tokens // 2
    found = np.ones((4, orders + 1))
    power = np.eye(len(size))
    for k in range(1, orders + 1):
        power = average @ power
        columns = (size[:, None] * np.square(power)).sum(0) / size
        found[0, k] = columns.sum() / tokens
        found[1, k] = columns[late].sum() / size[late].sum()
        found[2, k] = _spread(power, size, size)
        found[3, k] = _spread(power[late], size[late], size)
    if orders:
        found[2:, 1] = _first_spread(harmonic, 0), _first_spread(harmonic, tokens // 2)
    found.setflags(write=False)
    return Shares(*found)


def _spread(power: Array, rows: Array, columns: Array) -> float:
    """Mean square deviation of the rows from their mean, of unit noise at every token of every column's bin."""
    apart = power - rows @ power / rows.sum()
    return float(rows @ np.square(apart) @ (1 / columns) / max(rows.sum() - 1, 1))


def _first_spread(harmonic: Array, begin: int) -> float:
    """The same of J itself from token `begin` on, exactly: one row has t entries of 1/t, and bins blur them."""
    tokens = len(harmonic) - 1
    rows = tokens - begin
    mean = (harmonic[-1] - harmonic[np.maximum(np.arange(tokens), begin)]) / rows
    return float((harmonic[-1] - harmonic[begin] - rows * mean @ mean) / max(rows - 1, 1))


def _edges(tokens: int) -> NDArray[np.intp]:
    edges = list(range(min(_SINGLE, tokens) + 1))
    while edges[-1] < tokens:
        edges.append(min(tokens, int(np.ceil(edges[-1] * _GROWTH))))
    return np.unique(np.array([*edges, tokens // 2], dtype=np.intp))
