r"""The (q, p) map over depth: every layer's token similarity and size, or the last layer's alone.

giorlandino_goldt, arXiv 2505.24333; steps and symbols in `giorlandino_goldt_map`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.theory.giorlandino_goldt_map import Attended, BlockMap, Overlaps, Tokens
from fullrank.theory.giorlandino_goldt_parameters import parameters_of

__all__ = ["Course", "Layer", "Summary", "course", "everywhere", "final", "late", "layers"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """Over layers 0 (before the first block) to L, of late tokens where attention is causal.

    Attributes:
        similarity: ρ, mean cosine between different tokens, (…, L + 1) or (…).
        q: mean square of the entries of a token, likewise.
    """

    similarity: Array
    q: Array


class Summary(NamedTuple):
    """Of some tokens: mean cosine, mean square of entries, and the share of it that two of them have in common."""

    similarity: Array
    q: Array
    shared: Array


class Layer(NamedTuple):
    """One layer: states after attention and after the block, and attention's own numbers; None before the first."""

    out: Overlaps
    mid: Overlaps | None
    attended: Attended | None


def course(architecture: Architecture, *, tokens: Tokens = "finite", centred: bool = False, **fields: Any) -> Course:
    """ρ and q after every block.

    Args:
        architecture: where to start from.
        tokens: `finite`, with the context's Y₂ and the 1/T terms, or `limit`, the paper's T → ∞ at fixed gauge.
        centred: whether attention's output is centred: the paper's gain control.
        **fields: arrays (or values) in place of fields, by name or shorthand; they broadcast. Depth cannot vary.

    Returns:
        Arrays with the layers last.
    """
    block = BlockMap.of(parameters_of(architecture, **fields), tokens, centred=centred)
    seen = [late(block, layer.out) for layer in layers(block)]
    shape = block.parameters.shape
    rho, q = ([np.broadcast_to(one[which], shape) for one in seen] for which in (0, 1))
    return Course(np.stack(rho, -1), np.stack(q, -1))


def final(architecture: Architecture, *, tokens: Tokens = "finite", centred: bool = False, **fields: Any) -> Course:
    """ρ and q after the last block; memory does not grow with depth, which may vary too.

    Args:
        architecture: where to start from.
        tokens: as in `course`.
        centred: as in `course`.
        **fields: as in `course`, and depth.

    Returns:
        Arrays of the shape that the fields broadcast to.
    """
    block = BlockMap.of(parameters_of(architecture, **fields), tokens, centred=centred)
    depth = block.parameters.depth
    rho = q = np.zeros(block.parameters.shape)
    for number, layer in enumerate(layers(block)):
        now = late(block, layer.out)
        rho, q = np.where(number <= depth, now.similarity, rho), np.where(number <= depth, now.q, q)
    return Course(rho, q)


def layers(block: BlockMap) -> Iterator[Layer]:
    """Layer 0, then one after each block, keeping none."""
    state = block.start()
    yield Layer(state, None, None)
    for _ in range(int(block.parameters.depth.max())):
        middle, state, attended = block.block(state)
        yield Layer(state, middle, attended)


def late(block: BlockMap, state: Overlaps) -> Summary:
    """Of the last class of positions: late tokens, or all where attention is full."""
    rho = np.minimum(state.p[-1] / np.maximum(state.q[-1], 1e-300), 1.0)
    return Summary(rho, state.q[-1], rho)


def everywhere(block: BlockMap, state: Overlaps) -> Summary:
    """Of all tokens of the sequence."""
    at = block.positions
    pairs = at.share[at.first] * at.share[at.second] * np.where(at.first == at.second, 1, 2)
    rho = state.p / np.sqrt(np.maximum(state.q[at.first] * state.q[at.second], 1e-300))
    q = np.tensordot(at.share, state.q, 1)
    shared = np.tensordot(pairs, state.p, 1) / np.maximum(q, 1e-300)
    return Summary(np.minimum(np.tensordot(pairs, rho, 1), 1.0), q, np.minimum(shared, 1.0))
