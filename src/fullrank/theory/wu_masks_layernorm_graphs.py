r"""Attention masks as graphs: who reaches whom, from where, and in how many layers (arXiv 2405.18781, 2502.01951).

A mask is a boolean matrix of shape (queries, keys), true where query $i$ sees key $j$: the edge $j \to i$ along which
a token's content travels in one layer. Every query has to see a key; self-loops are usual and nowhere assumed.

A **centre node** reaches every node. The **eccentricity** of a centre is the number of layers until the last node has
heard of it, the **radius** the smallest eccentricity of a centre: after that many layers one token has reached all,
and this is what the paper's rate of collapse is monotone in. Without a centre tokens need never agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError

__all__ = ["MASKS", "MaskGraph", "attention_mask", "mask_graph"]

Mask = NDArray[np.bool_]

MASKS: Final = ("full", "causal", "window", "causal-window", "dilated", "prefix", "big-bird")
"""Names that `attention_mask` knows."""


def attention_mask(
    name: str, tokens: int, *, reach: int = 1, dilation: int = 1, marked: int = 1, drawn: int = 0, seed: int = 0
) -> Mask:
    r"""A mask by its name.

    - `full`: every key; `causal`: keys $j \le i$;
    - `window`: $|i - j| \le$ reach; `causal-window`: $0 \le i - j \le$ reach, which does not count the query itself;
    - `dilated`: $|i - j| \in \{0, \delta, 2\delta, \ldots, \text{reach}\,\delta\}$ for dilation δ;
    - `prefix`: causal, and every query sees the first `marked` tokens, which see one another;
    - `big-bird`: the window, `marked` first tokens that see all and are seen by all, and `drawn` random keys a query.

    Args:
        name: of `MASKS`.
        tokens: N.
        reach: keys to each side of a window, the query not counted.
        dilation: step between keys of `dilated`.
        marked: first tokens of `prefix` and `big-bird`.
        drawn: random keys of each query of `big-bird`.
        seed: of those.

    Returns:
        Of shape (N, N).

    Raises:
        TheoryError: for an unknown name, or numbers that make no mask.
    """
    for field, value, least in (
        ("tokens", tokens, 1),
        ("reach", reach, 0),
        ("dilation", dilation, 1),
        ("marked", marked, 0),
        ("drawn", drawn, 0),
    ):
        if value < least:
            raise TheoryError(f"{field}={value} makes no mask: {least} or more is accepted.")
    place = np.arange(tokens)
    back = place[:, None] - place  # how far the key lies behind the query
    match name:
        case "full":
            return np.ones((tokens, tokens), bool)
        case "causal":
            return np.asarray(back >= 0)
        case "window":
            return np.asarray(np.abs(back) <= reach)
        case "causal-window":
            return np.asarray((back >= 0) & (back <= reach))
        case "dilated":
            return np.asarray((np.abs(back) <= reach * dilation) & (back % dilation == 0))
        case "prefix":
            return np.asarray((back >= 0) | (place < marked))
        case "big-bird":
            seen = (np.abs(back) <= reach) | (place < marked) | (place < marked)[:, None]
            chosen = np.random.default_rng(seed).integers(tokens, size=(tokens, drawn))
            np.put_along_axis(seen, chosen, True, axis=1)
            return np.asarray(seen)
    raise TheoryError(f"mask={name!r} is unknown: there are {', '.join(MASKS)}.")


# ------------------------------------------------------------ as a graph


@dataclass(frozen=True)
class MaskGraph:
    """What a mask says of where content can go.

    Attributes:
        centres: of shape (tokens,), true for nodes that reach every node.
        radius: smallest eccentricity of a centre, in layers; None without a centre.
        strongly_connected: whether every node is a centre.
    """

    centres: Mask
    radius: int | None
    strongly_connected: bool

    @property
    def quasi_strongly_connected(self) -> bool:
        """Whether there is a centre: then attention without a norm collapses onto what the centres carry."""
        return bool(self.centres.any())


def mask_graph(mask: ArrayLike) -> MaskGraph:
    r"""Centres, radius and connectivity of a mask.

    One search costs O(N²). Centres take a few searches; the radius takes few as well, because a search backwards from
    the node that is farthest from one centre bounds the eccentricities of all others from below (N searches at most,
    on masks whose nodes are all alike).

    Args:
        mask: of shape (queries, keys), boolean.

    Returns:
        Its graph.
    """
    keys = checked_mask(mask)
    queries = np.ascontiguousarray(keys.T)  # of each key: those who hear it
    centres = _centres(keys, queries)
    radius = _radius(keys, queries, centres) if centres.any() else None
    return MaskGraph(centres, radius, bool(centres.all()))


def checked_mask(mask: ArrayLike) -> Mask:
    """A mask as a boolean array.

    Args:
        mask: of shape (queries, keys).

    Returns:
        The same.

    Raises:
        TheoryError: where it is not boolean, not square, or a query sees no key.
    """
    keys = np.asarray(mask)
    if keys.dtype != np.bool_ or keys.ndim != 2 or keys.shape[0] != keys.shape[1] or not keys.size:
        raise TheoryError(f"mask of {keys.dtype} and shape {keys.shape} must be boolean, of shape (queries, keys).")
    blind = np.flatnonzero(~keys.any(1))
    if blind.size:
        raise TheoryError(f"query {int(blind[0])} of the mask sees no key: every query must see one.")
    return keys


def distances(start: int, heard: Mask) -> NDArray[np.int64]:
    """Layers from one node to every other, −1 for those never reached.

    Args:
        start: the node.
        heard: of shape (nodes, nodes), row by row the nodes that are one layer further; a mask's transpose for where
            content goes, the mask itself for where it comes from.

    Returns:
        Of shape (nodes,).
    """
    found = np.full(heard.shape[0], -1, np.int64)
    found[start] = 0
    front, steps = np.array([start]), 0
    while front.size:
        steps += 1
        front = np.flatnonzero(heard[front].any(0) & (found < 0))
        found[front] = steps
    return found


def _centres(keys: Mask, queries: Mask) -> Mask:
    """All nodes that reach one centre; the one is the last that a sweep of searches has to start from."""
    reached = np.zeros(len(keys), bool)
    candidate = 0
    while not reached.all():
        candidate = int(np.argmin(reached))
        front = np.array([candidate])
        while front.size:  # what an earlier start has reached is not gone through again
            reached[front] = True
            front = np.flatnonzero(queries[front].any(0) & ~reached)
    if (distances(candidate, queries) < 0).any():
        return np.zeros(len(keys), bool)
    return np.asarray(distances(candidate, keys) >= 0)


def _radius(keys: Mask, queries: Mask, centres: Mask) -> int:
    open_ones = centres.copy()
    least = np.zeros(len(keys), np.int64)  # each node's eccentricity is at least this
    best = len(keys)
    while open_ones.any():
        candidate = int(np.flatnonzero(open_ones)[np.argmin(least[open_ones])])
        away = distances(candidate, queries)
        best = min(best, int(away.max()))
        least = np.maximum(least, distances(int(away.argmax()), keys))
        open_ones[candidate] = False
        open_ones &= least < best
    return best
