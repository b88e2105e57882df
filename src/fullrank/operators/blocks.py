"""Scores in pieces: which sequences, heads and rows are treated at a time, and the scores of one such piece."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.operators.masks import Mask, Shape, Span
from fullrank.operators.scores import Scores

__all__ = ["BLOCK", "ScoreBlocks", "Tile", "tiles"]

BLOCK = 1 << 20
"""Entries of one block of scores: 4 MiB in float32; two to four buffers of this size live at once."""

_FLOOR = -40.0
"""Shifted scores stop here on a CPU in float32: exp is 4e-18, far below what any number here resolves, and its square
is still a normal number; denormals would take ten times as long."""


class Tile(NamedTuple):
    """Some sequences and heads that are treated together, and the blocks of rows they are cut into."""

    batch: slice
    heads: slice
    rows: list[slice]


def tiles(
    shape: Shape, *, group: int = 1, together: bool = False, mask: Mask | None = None, entries: int | None = None
) -> Iterator[Tile]:
    """Cut (batch, heads, queries, keys) into blocks of about `BLOCK` scores.

    Short maps are taken many at a time, long ones one key head at a time and a few rows at a time.

    Args:
        shape: of the whole map.
        group: query heads that share a key head and stay together.
        together: keep all sequences and heads together (where a bias is computed for all of them at once).
        mask: lets blocks have more rows where each sees a few keys only.
        entries: scores in a block, where it is not `BLOCK`.

    Yields:
        The tiles, covering everything once.
    """
    entries = BLOCK if entries is None else entries
    batch, heads, queries, keys = shape
    per_sequence = heads * queries * keys
    if together:
        sequences, some = batch, heads
    elif per_sequence <= entries:
        sequences, some = min(batch, entries // max(1, per_sequence)), heads
    else:
        sequences, some = 1, min(heads, group * max(1, entries // max(1, group * queries * keys)))
    sequences, some = max(1, sequences), max(1, some)
    rows = max(1, min(queries, entries // max(1, sequences * some * keys)))
    blocks = _cut(queries, rows)
    while mask is not None and rows < queries:
        wider = _cut(queries, 2 * rows)
        widest = max(span.stop - span.start for span in mask.spans(wider, shape))
        if 2 * rows * widest * sequences * some > entries:
            break
        rows, blocks = 2 * rows, wider
    for b in range(0, batch, sequences):
        for h in range(0, heads, some):
            yield Tile(slice(b, min(b + sequences, batch)), slice(h, min(h + some, heads)), blocks)


def _cut(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class ScoreBlocks:
    """Scores of one tile, block by block, in buffers that are used again for each block.

    Keys are brought to the precision of sums once. With `centred`, their mean is taken off first: that shifts every row
    of scores by a constant, which the softmax does not see, and a direction that all keys share costs no precision.
    """

    def __init__(self, scores: Scores, *, centred: bool = False):
        self.scores = scores
        key = scores.key.to(scores.dtype)
        self.centre: Tensor | None = None
        if centred and scores.softcap is None and scores.sink is None and key.shape[2]:
            self.centre = key.mean(2, keepdim=True)
            key = key - self.centre
        self.key = key.flatten(0, 1)  # (batch · key heads, keys, width)
        norm = torch.linalg.vector_norm(key, dim=-1).amax(-1) if key.shape[2] else key.new_zeros(key.shape[:2])
        self.key_norm = norm.repeat_interleave(scores.group, 1)[..., None]  # the largest, (batch, heads, 1)
        self._buffers = [key.new_empty(0), key.new_empty(0)]

    def buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised memory, the same for every block."""
        size = torch.Size(shape).numel()
        if self._buffers[index].numel() < size:
            self._buffers[index] = self.key.new_empty(size)
        return self._buffers[index][:size].view(shape)

    def stacked_query(self, rows: slice) -> Tensor:
        """Scaled queries (batch, key heads, group · rows, width): heads that share a key head below one another."""
        scores = self.scores
        q = scores.query[:, :, rows].to(self.key.dtype) * scores.factor
        return q.reshape(q.shape[0], q.shape[1] // scores.group, scores.group * q.shape[2], q.shape[3])

    def query_norm(self, rows: slice) -> Tensor:
        """‖scale · q‖ of each query, (batch, heads, rows)."""
        q = self.stacked_query(rows)
        norm: Tensor = torch.linalg.vector_norm(q, dim=-1)
        return norm.view(q.shape[0], self.scores.shape[1], -1)

    def raw(self, rows: slice, span: Span) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, heads, rows, keys of the span) before the mask, and the shift taken from each row."""
        scores = self.scores
        batch, heads = scores.shape[:2]
        q = self.stacked_query(rows)
        keys = self.key[:, span.start : span.stop].mT
        flat = self.buffer(0, (keys.shape[0], q.shape[2], keys.shape[2]))
        torch.bmm(q.flatten(0, 1), keys, out=flat)
        s = flat.view(batch, heads, rows.stop - rows.start, keys.shape[2])
        if scores.softcap is not None:
            s.div_(scores.softcap).tanh_().mul_(scores.softcap)
        bias = scores.bias_block(rows, slice(span.start, span.stop))
        if bias is not None:
            s.add_(bias)
        if self.centre is None:
            return s, None
        return s, (q.double() @ self.centre.double().mT).view(s.shape[:3])

    def edges(self, rows: slice, span: Span) -> list[tuple[slice, Tensor]]:
        """The ranges of keys (counted from the span's start) in which something may be hidden, and what is."""
        found = []
        for start, stop in ((span.start, span.clear_start), (span.clear_stop, span.stop)):
            if start < stop:
                visible = self.scores.visible(rows, slice(start, stop))
                if visible is not None:
                    found.append((slice(start - span.start, stop - span.start), ~visible))
        return found

    def sink(self) -> Tensor | None:
        """Sink logits (heads, 1) in the scores' precision."""
        return None if self.scores.sink is None else self.scores.sink.to(self.key.dtype)[:, None]

    def shift_by_maximum(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Take the row maximum m (of the sink too) off masked scores in place; also gives the maximum of the scores."""
        top = s.amax(-1)
        sink = self.sink()
        m = top if sink is None else torch.maximum(top, sink)
        m = m.masked_fill(m == -torch.inf, 0)
        s.sub_(m[..., None])
        return m, top

    def clamp(self, s: Tensor, edges: list[tuple[slice, Tensor]]) -> None:
        """Keep exp clear of denormals, and hidden entries finite: whoever calls sets their exp to 0."""
        if s.device.type == "cpu" and s.dtype == torch.float32:
            s.clamp_(min=_FLOOR)
            return
        for edge, _ in edges:
            s[..., edge].clamp_(min=-1e4)

    def weights(self, rows: slice, span: Span) -> Tensor:
        """The block of A on the span, in a buffer that the next block overwrites."""
        s, _ = self.raw(rows, span)
        for edge, hidden in self.edges(rows, span):
            s[..., edge].masked_fill_(hidden, -torch.inf)
        m, _ = self.shift_by_maximum(s)
        if s.device.type == "cpu" and s.dtype == torch.float32:
            torch.threshold_(s, _FLOOR, -torch.inf)
        Z = s.exp_().sum(-1)
        sink = self.sink()
        if sink is not None:
            Z += (sink - m).exp()
        return s.div_(Z.masked_fill_(Z == 0, 1)[..., None])
