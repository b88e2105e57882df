"""One pass over the score matrix by blocks of query rows: everything a summary holds, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from fullrank.operators.masks import Shape, Span
from fullrank.operators.scores import Scores
from fullrank.operators.summary import Summary

__all__ = ["BLOCK", "Tile", "summarise", "tiles"]

BLOCK = 1 << 20
"""Entries of one block of scores: 4 MiB in float32, and at most four such buffers live at once."""

_FLOOR = -40.0
"""Shifted scores stop here on a CPU in float32: exp is 4e-18, far below what any number here resolves, and its square
is still a normal number; denormals would take ten times as long."""


class Tile(NamedTuple):
    """Some sequences and heads that are treated together, and the blocks of rows they are cut into."""

    batch: slice
    heads: slice
    rows: list[slice]


def tiles(shape: Shape, *, group: int = 1, together: bool = False, entries: int = BLOCK) -> Iterator[Tile]:
    """Cut (batch, heads, queries, keys) into blocks of about `entries` scores.

    Short maps are taken many at a time, long ones one key head at a time and a few rows at a time.

    Args:
        shape: of the whole map.
        group: query heads that share a key head and stay together.
        together: keep all sequences and heads together (where a bias is computed for all of them at once).
        entries: scores in a block.

    Yields:
        The tiles, covering everything once.
    """
    batch, heads, queries, keys = shape
    per_sequence = heads * queries * keys
    if together:
        sequences, together_heads = batch, heads
    elif per_sequence <= entries:
        sequences, together_heads = max(1, entries // max(1, per_sequence)), heads
    else:
        sequences, together_heads = 1, min(heads, group * max(1, entries // max(1, group * queries * keys)))
    rows = max(1, min(queries, entries // max(1, sequences * together_heads * keys)))
    blocks = [slice(t, min(t + rows, queries)) for t in range(0, queries, rows)]
    for b in range(0, batch, max(1, sequences)):
        for h in range(0, heads, max(1, together_heads)):
            yield Tile(slice(b, min(b + sequences, batch)), slice(h, min(h + together_heads, heads)), blocks)


@torch.no_grad()
def summarise(scores: Scores, groups: Bool[Tensor, "groups batch queries"] | None = None) -> Summary:
    """The summary of softmax(scores), in one pass.

    Per block of rows: m = max_s s, Z = Σ exp(s − m), log-sum-exp m + log Z, entropy Σ p (m − s) + log Z, and
    Σ A² = Σ exp(2(s − m)) / Z². Keys are centred first (which shifts every row of scores by a constant, put back
    afterwards), so that a direction that all keys share costs no precision. Cost: one product of queries and keys and
    some ten passes over each block; memory: a few blocks of 4 MiB and the result.

    Args:
        scores: what is softmaxed.
        groups: groups of rows whose mean row is wanted; by default one, of all rows that see a key.

    Returns:
        The summary.
    """
    batch, heads, queries, keys = scores.shape
    device = scores.device
    visible = scores.mask.visible_count(scores.shape, device).expand(batch, heads, queries)
    member = torch.ones(1, batch, queries, dtype=torch.bool, device=device) if groups is None else groups.to(device)
    weight = member[:, :, None] & (visible > 0)  # (groups, batch, heads, queries)
    out = {name: torch.empty(batch, heads, queries, dtype=torch.float64, device=device) for name in _ROWS}
    columns = torch.zeros(len(member), batch, heads, keys, dtype=torch.float64, device=device)
    for tile in tiles(scores.shape, group=scores.group, together=callable(scores.bias)):
        at = (tile.batch, tile.heads)
        part = {name: tensor[at] for name, tensor in out.items()}
        _Pass(scores.select(*at), visible[at], weight[:, *at]).run(tile.rows, part, columns[:, *at])
    hidden = visible == 0
    rows = {name: tensor.masked_fill_(hidden, torch.nan) for name, tensor in out.items()}
    columns /= weight.sum(-1)[..., None]  # 0/0 for a group without rows
    return Summary(**rows, visible=visible, column_mean=columns)


_ROWS = (
    "log_sum_exp",
    "entropy",
    "inverse_participation",
    "max_logit",
    "logit_mean",
    "logit_std",
    "row_sum",
)


class _Pass:
    """The pass over one tile, with the buffers that its blocks share."""

    def __init__(self, scores: Scores, visible: Tensor, weight: Tensor):
        self.scores, self.visible, self.weight = scores, visible, weight
        k = scores.key.to(scores.dtype)
        self.centre = None
        if scores.softcap is None and k.shape[2]:
            self.centre = k.mean(2, keepdim=True)
            k = k - self.centre
        self.key = k.flatten(0, 1)  # (batch · key heads, keys, width)
        self.buffers: list[Tensor] = [k.new_empty(0), k.new_empty(0)]

    def run(self, blocks: list[slice], out: dict[str, Tensor], columns: Tensor) -> None:
        for rows, span in zip(blocks, self.scores.mask.spans(blocks, self.scores.shape), strict=True):
            if span.start == span.stop:
                continue  # no query of the block sees a key: all of it becomes NaN
            found = self.block(rows, span, columns)
            for name, value in found.items():
                out[name][..., rows] = value

    def buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        if self.buffers[index].numel() < size:
            self.buffers[index] = self.key.new_empty(size)
        return self.buffers[index][:size].view(shape)

    def block(self, rows: slice, span: Span, columns: Tensor) -> dict[str, Tensor]:
        s, shift = self.products(rows, span)
        edges = self.edges(rows, span)
        total, squares = self.moments(s, span, edges)
        for edge, hidden in edges:
            s[..., edge].masked_fill_(hidden, -torch.inf)
        top = s.amax(-1)
        m = top if self.scores.sink is None else torch.maximum(top, self.sink)
        m = m.masked_fill(m == -torch.inf, 0)
        s.sub_(m[..., None])
        self.clamp(s, edges)
        p = torch.exp(s, out=self.buffer(1, s.shape))
        for edge, hidden in edges:
            p[..., edge].masked_fill_(hidden, 0)
        Z = p.sum(-1).double()
        rest = Z
        E = torch.linalg.vecdot(p, s).double()
        Y = torch.linalg.vector_norm(p, dim=-1).double() ** 2
        if self.scores.sink is not None:
            Z = Z + (self.sink - m).double().exp()
        weight = (self.weight[..., rows] / Z).movedim(0, 2).to(p.dtype)  # (batch, heads, groups, rows)
        columns[..., span.start : span.stop] += (weight @ p).movedim(2, 0)
        n = self.visible[..., rows]
        mean = total / n
        row_sum = rest / Z
        return {
            "log_sum_exp": m.double() + Z.log() + shift,
            "entropy": (row_sum * Z.log() - E / Z).clamp(min=0),
            "inverse_participation": Y / Z**2,
            "max_logit": top.double() + shift,
            "logit_mean": mean + shift,
            "logit_std": (squares / n - mean**2).clamp(min=0).sqrt(),
            "row_sum": row_sum,
        }

    @property
    def sink(self) -> Tensor:
        assert self.scores.sink is not None
        return self.scores.sink.to(self.key.dtype)[:, None]

    def products(self, rows: slice, span: Span) -> tuple[Tensor, Tensor]:
        """Scores of the block (without mask), and what centring the keys took from each row."""
        scores = self.scores
        batch, heads = scores.shape[:2]
        q = scores.query[:, :, rows].to(self.key.dtype) * scores.factor
        count = q.shape[2]
        shift = torch.zeros(batch, heads, count, dtype=torch.float64, device=q.device)
        stacked = q.reshape(batch, heads // scores.group, scores.group * count, q.shape[3])
        if self.centre is not None:
            shift = (stacked.double() @ self.centre.double().mT).view(batch, heads, count)
        keys = self.key[:, span.start : span.stop].mT
        flat = self.buffer(0, (keys.shape[0], stacked.shape[2], keys.shape[2]))
        torch.bmm(stacked.flatten(0, 1), keys, out=flat)
        s = flat.view(batch, heads, count, keys.shape[2])
        if scores.softcap is not None:
            s.div_(scores.softcap).tanh_().mul_(scores.softcap)
        bias = scores.bias_block(rows, slice(span.start, span.stop))
        if bias is not None:
            s.add_(bias)
        return s, shift

    def edges(self, rows: slice, span: Span) -> list[tuple[slice, Tensor]]:
        """The ranges of keys (from the span's start) in which something may be hidden, and what."""
        found = []
        for start, stop in ((span.start, span.clear_start), (span.clear_stop, span.stop)):
            if start < stop:
                visible = self.scores.visible(rows, slice(start, stop))
                if visible is not None:
                    found.append((slice(start - span.start, stop - span.start), ~visible))
        return found

    def moments(self, s: Tensor, span: Span, edges: list[tuple[slice, Tensor]]) -> tuple[Tensor, Tensor]:
        """Σ s and Σ s² over the visible keys."""
        if not edges:
            return s.sum(-1).double(), torch.linalg.vector_norm(s, dim=-1).double() ** 2
        total = torch.zeros(s.shape[:3], dtype=torch.float64, device=s.device)
        squares = torch.zeros_like(total)
        clear = s[..., span.clear_start - span.start : span.clear_stop - span.start]
        if clear.shape[-1]:
            total += clear.sum(-1)
            squares += torch.linalg.vector_norm(clear, dim=-1).double() ** 2
        for edge, hidden in edges:
            seen = s[..., edge].masked_fill(hidden, 0)
            total += seen.sum(-1)
            squares += torch.linalg.vector_norm(seen, dim=-1).double() ** 2
        return total, squares

    def clamp(self, s: Tensor, edges: list[tuple[slice, Tensor]]) -> None:
        """Keep exp clear of denormals, and hidden entries finite (their exp is set to 0 afterwards)."""
        if s.device.type == "cpu" and s.dtype == torch.float32:
            s.clamp_(min=_FLOOR)
            return
        for edge, _ in edges:
            s[..., edge].clamp_(min=-1e4)
