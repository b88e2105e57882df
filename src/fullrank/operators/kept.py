"""Attention maps that are small enough to be kept: computed once, multiplied often.

A pass over a kept map costs a third of a pass that recomputes the softmax. Rows are kept in slabs, each with the range
of keys that its queries can see: a causal map takes half the memory and half the time of a full one, a window less.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.operators.attention import AttentionMap, AttentionOperator
from fullrank.operators.blocks import tiles
from fullrank.operators.masks import Shape, Span
from fullrank.operators.scores import Scores

__all__ = ["Kept", "Slab", "keep", "kept_bytes"]

_ONE_SLAB = 1 << 18
"""Maps of up to this many entries (T = 512) are kept as one slab: there, fewer and larger products win."""

_FLOOR = -40.0
"""Shifted scores below this count as −∞ in float32: exp is 4e-18 there, and denormals would take ten times as long."""

_SAFE = 43.0
"""Scores within ±43 differ by at most 86, and exp(−86) is still a normal number."""


class Slab(NamedTuple):
    """Some rows of a map, and the range of keys outside of which they are zero."""

    queries: slice
    keys: slice
    weights: Tensor  # (batch, heads, q, k)


@dataclass(frozen=True, eq=False)
class Kept:
    """A map in memory, by slabs of rows; a linear operator.

    Attributes:
        shape: (batch, heads, queries, keys).
        slabs: every query that sees a key is in exactly one.
        dtype: of the weights.
        device: of the weights.
    """

    shape: Shape
    slabs: tuple[Slab, ...]
    dtype: torch.dtype
    device: torch.device

    def matmat(self, V: Float[Tensor, "batch heads keys columns"]) -> Float[Tensor, "batch heads queries columns"]:
        """A V."""
        if len(self.slabs) == 1 and self.slabs[0].weights.shape == self.shape:
            return self.slabs[0].weights @ V
        out = V.new_zeros(*self.shape[:3], V.shape[3])
        for queries, keys, weights in self.slabs:
            out[:, :, queries] = weights @ V[:, :, keys]
        return out

    def rmatmat(self, U: Float[Tensor, "batch heads queries columns"]) -> Float[Tensor, "batch heads keys columns"]:
        """Aᵀ U."""
        if len(self.slabs) == 1 and self.slabs[0].weights.shape == self.shape:
            return self.slabs[0].weights.mT @ U
        out = U.new_zeros(*self.shape[:2], self.shape[3], U.shape[3])
        for queries, keys, weights in self.slabs:
            out[:, :, keys] += weights.mT @ U[:, :, queries]
        return out


def kept_bytes(attention_map: AttentionMap) -> int:
    """Bytes that one head's map takes when kept; masks that hide ranges of keys make it less.

    Args:
        attention_map: the batch of maps.

    Returns:
        Bytes per (sequence, head).
    """
    shape = attention_map.shape
    size = 4 if attention_map.dtype == torch.float32 else 8
    if shape[2] * shape[3] <= _ONE_SLAB:
        return shape[2] * shape[3] * size
    blocks = _blocks((1, 1, *shape[2:]))
    spans = attention_map.mask.spans(blocks, shape)
    entries: int = sum((b.stop - b.start) * (s.stop - s.start) for b, s in zip(blocks, spans, strict=True))
    return size * entries


@torch.no_grad()
def keep(attention_map: AttentionMap) -> Kept:
    """The map, computed once and kept. O(B H T S (width + 1)).

    Args:
        attention_map: a map that streams, or one that a model made.

    Returns:
        An operator with the same products.
    """
    shape = attention_map.shape
    if shape[2] * shape[3] <= _ONE_SLAB:
        whole = torch.empty(shape, dtype=attention_map.dtype, device=attention_map.device)
        for tile in tiles(shape):
            part = attention_map.select(tile.batch, tile.heads)
            rows = slice(0, shape[2])
            whole[tile.batch, tile.heads] = _weights(part, rows, Span(0, 0, 0, shape[3]))
        slabs = [Slab(slice(0, shape[2]), slice(0, shape[3]), whole)]
    else:
        blocks = _blocks(shape)
        spans = attention_map.mask.spans(blocks, shape)
        slabs = [
            Slab(rows, slice(span.start, span.stop), _weights(attention_map, rows, span))
            for rows, span in zip(blocks, spans, strict=True)
            if span.start < span.stop
        ]
    return Kept(shape, tuple(slabs), attention_map.dtype, attention_map.device)


def _blocks(shape: Shape) -> list[slice]:
    return next(tiles((1, 1, *shape[2:]))).rows


def _weights(attention_map: AttentionMap, rows: slice, span: Span) -> Tensor:
    """The rows, on the range of keys that they can see."""
    if not isinstance(attention_map, AttentionOperator):
        return attention_map.rows(rows)[..., span.start : span.stop].contiguous()
    scores = attention_map.scores
    s = _visible_scores(scores, rows, span)
    if _plain(scores, rows):
        return torch.softmax(s, -1)
    top = s.amax(-1, keepdim=True)
    if scores.sink is not None:
        sink = scores.sink.to(s.dtype)[:, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0)
    s.sub_(top)
    if s.dtype == torch.float32:
        torch.threshold_(s, _FLOOR, -torch.inf)
    Z = s.exp_().sum(-1, keepdim=True)
    if scores.sink is not None:
        Z += (sink - top).exp()
    return s.div_(Z.masked_fill_(Z == 0, 1))


def _plain(scores: Scores, rows: slice) -> bool:
    """Whether torch's softmax will do: no sink, no row without keys, and no score so low that its exp is denormal."""
    if scores.sink is not None or scores.bias is not None:
        return False
    query, key = (x.to(scores.dtype).norm(dim=-1).amax() for x in (scores.query[:, :, rows], scores.key))
    bound = abs(scores.scale or 0) * float(query * key)
    first, stop = scores.mask.intervals(scores.shape, "cpu")
    simple = scores.mask.plain and scores.mask.keys(scores.shape) is None
    return bound < _SAFE and simple and bool((stop > first)[:, rows].all())


def _visible_scores(scores: Scores, rows: slice, span: Span) -> Tensor:
    """Scores of the rows, with the mask looked at only where it hides something."""
    edges = [(span.start, span.clear_start), (span.clear_start, span.clear_stop), (span.clear_stop, span.stop)]
    parts = [scores.block(rows, slice(start, stop)) for start, stop in edges if start < stop]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
