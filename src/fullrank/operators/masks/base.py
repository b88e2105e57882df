"""What every mask is: an interval of keys per query, a set of keys that exist, and whatever is left over.

Of the masks met in practice all but the arbitrary ones are an interval per query (full, causal, window, block, prefix,
documents that follow one another) cut by a set of keys (padding). Keeping the two apart lets counts, uniform averages
and skipped blocks cost O(T) instead of O(T²).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Both", "Mask", "Shape", "Span", "restrict"]

Shape = tuple[int, int, int, int]
"""(batch, heads, queries, keys) of the map that a mask is applied to."""

Device = torch.device | str | None


class Span(NamedTuple):
    """The keys one block of queries needs: none outside [start, stop), and all inside [clear_start, clear_stop)."""

    start: int
    clear_start: int
    clear_stop: int
    stop: int


class Mask(ABC):
    """Who is visible to whom: query t sees key s. Masks combine with `&`."""

    is_causal: bool = False
    """Whether no query sees a key that comes after it."""

    plain: bool = True
    """Whether intervals and keys say everything, so that no pattern is left over."""

    @abstractmethod
    def intervals(
        self, shape: Shape, device: Device = None
    ) -> tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch queries"]]:
        """First visible key and one past the last one, of each query; equal for a query that sees none."""

    def keys(self, shape: Shape, device: Device = None) -> Bool[Tensor, "#batch #heads keys"] | None:
        """Which keys exist for any query at all; None when all do."""
        return None

    def pattern(self, queries: slice, keys: slice, shape: Shape) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """What intervals and keys do not say, for one block; None when they say all."""
        return None

    def select(self, batch: slice, heads: slice) -> "Mask":
        """The mask of some sequences and heads."""
        return self

    def leading(self, tokens: int) -> "Mask":
        """The mask of the first tokens, as queries and as keys; a mask that goes by position alone is its own."""
        return self

    def __and__(self, other: "Mask") -> "Mask":
        """Visible in both."""
        return Both((*getattr(self, "parts", (self,)), *getattr(other, "parts", (other,))))

    def block(
        self, queries: slice, keys: slice, shape: Shape, *, device: Device = None
    ) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """Visibility of a range of keys to a range of queries.

        Args:
            queries: with explicit start and stop.
            keys: with explicit start and stop.
            shape: of the whole map.
            device: where the answer is wanted.

        Returns:
            True where visible, broadcastable over batch and heads; None when all of the block is visible.
        """
        parts: list[Tensor] = []
        first, stop = (bound[:, queries] for bound in self.intervals(shape, "cpu"))
        if first.numel() and (int(first.max()) > keys.start or int(stop.min()) < keys.stop):
            s = torch.arange(keys.start, keys.stop, device=device)
            first, stop = (bound[:, None, :, None].to(s.device) for bound in (first, stop))
            parts.append((s >= first) & (s < stop))
        real = self.keys(shape, device)
        if real is not None:
            parts.append(real[:, :, None, keys])
        pattern = self.pattern(queries, keys, shape)
        if pattern is not None:
            parts.append(pattern if device is None else pattern.to(device))
        return reduce(torch.logical_and, parts) if parts else None

    def spans(self, blocks: Sequence[slice], shape: Shape) -> list[Span]:
        """What each block of queries needs of the keys, so that the rest is skipped.

        Args:
            blocks: ranges of queries.
            shape: of the whole map.

        Returns:
            One span per block; an empty one (start = stop) where no query of the block sees a key.
        """
        first, stop = self.intervals(shape, "cpu")
        clear = self.plain and self.keys(shape) is None
        spans = []
        for rows in blocks:
            seen = stop[:, rows] > first[:, rows]
            if not bool(seen.any()):
                spans.append(Span(0, 0, 0, 0))
                continue
            start = int(torch.where(seen, first[:, rows], shape[3]).min())
            end = int(torch.where(seen, stop[:, rows], 0).max())
            inner = int(first[:, rows].max()), int(stop[:, rows].min())
            if not clear or inner[0] >= inner[1]:
                inner = end, end
            spans.append(Span(start, *inner, end))
        return spans

    def key_range(self, queries: slice, shape: Shape) -> tuple[int, int]:
        """The keys that any of these queries can see: none lies outside [start, stop)."""
        span = self.spans([queries], shape)[0]
        return span.start, span.stop

    def visible_count(self, shape: Shape, device: Device = None) -> Int[Tensor, "#batch #heads queries"]:
        """How many keys each query sees."""
        first, stop = (bound[:, None].to(device or "cpu") for bound in self.intervals(shape, device))
        real = self.keys(shape, device)
        if self.plain:
            if real is None:
                return stop - first
            before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))
            batch, heads = torch.broadcast_shapes(before.shape[:2], first.shape[:2])
            before = before.expand(batch, heads, -1)
            first, stop = (bound.expand(batch, heads, -1) for bound in (first, stop))
            return before.gather(-1, stop) - before.gather(-1, first)
        counts = []
        rows = max(1, (1 << 22) // max(1, shape[0] * shape[1] * shape[3]))
        for start in range(0, shape[2], rows):
            visible = self.block(slice(start, min(start + rows, shape[2])), slice(0, shape[3]), shape, device=device)
            assert visible is not None  # a mask with a pattern always has a block
            queries = min(start + rows, shape[2]) - start
            counts.append(visible.expand(*visible.shape[:2], queries, shape[3]).sum(-1))
        return torch.cat(counts, -1)

    def dense(self, shape: Shape, device: Device = None) -> Bool[Tensor, "#batch #heads queries keys"]:
        """The whole visibility, for small maps and tests."""
        visible = self.block(slice(0, shape[2]), slice(0, shape[3]), shape, device=device)
        if visible is None:
            visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return visible.expand(*visible.shape[:2], shape[2], shape[3])


@dataclass(frozen=True, eq=False)
class Both(Mask):
    """Visible in every one of `parts`; what `&` gives."""

    parts: tuple[Mask, ...]

    @property
    def is_causal(self) -> bool:  # type: ignore[override]
        """Whether one of the parts is."""
        return any(part.is_causal for part in self.parts)

    @property
    def plain(self) -> bool:  # type: ignore[override]
        """Whether all of the parts are."""
        return all(part.plain for part in self.parts)

    def intervals(
        self, shape: Shape, device: Device = None
    ) -> tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch queries"]]:
        """Intersection of the parts' intervals."""
        bounds = [part.intervals(shape, device) for part in self.parts]
        first = reduce(torch.maximum, (bound[0] for bound in bounds))
        stop = reduce(torch.minimum, (bound[1] for bound in bounds))
        return first, torch.maximum(first, stop)

    def keys(self, shape: Shape, device: Device = None) -> Bool[Tensor, "#batch #heads keys"] | None:
        """Keys that exist in all parts."""
        kept = [real for part in self.parts if (real := part.keys(shape, device)) is not None]
        return reduce(torch.logical_and, kept) if kept else None

    def pattern(self, queries: slice, keys: slice, shape: Shape) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """Conjunction of the parts' patterns."""
        kept = [rest for part in self.parts if (rest := part.pattern(queries, keys, shape)) is not None]
        return reduce(torch.logical_and, kept) if kept else None

    def select(self, batch: slice, heads: slice) -> Mask:
        """The parts of some sequences and heads."""
        return Both(tuple(part.select(batch, heads) for part in self.parts))

    def leading(self, tokens: int) -> Mask:
        """The parts of the first tokens."""
        return Both(tuple(part.leading(tokens) for part in self.parts))


def restrict(tensor: Tensor, batch: slice, heads: slice | None = None) -> Tensor:
    """Some sequences (and heads) of a tensor whose size there may be 1, standing for all."""
    if tensor.shape[0] != 1:
        tensor = tensor[batch]
    if heads is not None and tensor.shape[1] != 1:
        tensor = tensor[:, heads]
    return tensor
