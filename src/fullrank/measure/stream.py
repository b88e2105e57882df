"""What becomes of the residual stream from block to block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.capture.events import Event, Signal, StreamState
from fullrank.measure.energy import Energy, parts_of, residual_of, rms_of, similarity_of
from fullrank.measure.over_samples import OverSamples
from fullrank.measure.positions import late_tokens, real_or_all, without_first
from fullrank.measure.samples import Place, Samples
from fullrank.measure.standardized import Standardized
from fullrank.table import Row

__all__ = ["StackShape", "StreamObserver"]

_NEIGHBOURS = 2  # of a token: taken once for each state, and read by two metrics and by the next state
_POINTS = 512  # metrics of all pairs of tokens look at no more query tokens than this
_FEW = "needs at least two real tokens in the scope"
_NO_RANK = "no rank: fewer than two real tokens in the scope, or no difference between them that the dtype can hold"


@dataclass
class _Trail:
    """What one stack's later layers are compared with."""

    first: Tensor
    previous: Tensor
    near: metrics.Neighbours  # of the previous state
    basis: Tensor | None  # of the first state's row space; None where that may be everything


class StackShape(NamedTuple):
    """How much of a stack was seen: real tokens in the median sequence, width, sequences."""

    tokens: int
    width: int
    sequences: int


class StreamObserver:
    """Token metrics of every state of the residual stream and of what the blocks' norms hand on.

    Every number is taken per sequence over its real tokens; stacks named in `causal` are also read over their late
    tokens, the outputs of other stacks' blocks without the first token, since one large first token (a CLS or a
    register) sets every uncentred rank. Of a network without tokens every number is taken over the samples of a batch
    (scope `samples`). Metrics of neighbours draw at most 512 query tokens (`exact=False` then).

    Args:
        causal: names of stacks whose self-attention is causal.
    """

    needs: frozenset[Signal] = frozenset({"stream", "mid", "read"})

    def __init__(self, *, causal: Collection[str] = ()) -> None:
        self._causal = frozenset(causal)
        self._samples = Samples()
        self._energy = Energy()
        self._standardized = Standardized()
        self._over_samples = OverSamples()
        self._trails: dict[str, _Trail] = {}
        self._counts: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_trails": {}}  # the last states stay here when the numbers travel

    def see(self, event: Event) -> None:
        """Reduce one state to its numbers."""
        if not isinstance(event, StreamState):
            return
        X = event.value
        real = real_or_all(event.real, X.shape[0], X.shape[1], X.device)
        place = Place(event.stack, event.layer, event.site, event.part)
        if event.over == "samples":
            self._over_samples.add(place, X)
            if event.layer == 1:  # the first block may take in images
                self._counts.setdefault(event.stack, []).append(real.sum(-1))
                self._widths[event.stack] = X.shape[-1]
            return
        padded = event.real is not None
        self._see_tokens(place, X, real if padded else None, "all")
        if event.stack in self._causal:
            self._see_tokens(place, *_some(X, late_tokens(real), X.shape[1] // 2, padded), "late")
        elif (event.site, event.part) == ("stream", "out"):
            self._see_tokens(place, *_some(X, without_first(real), 1, padded), "no-first")
        if (event.site, event.part) == ("stream", "out"):
            if event.layer == 0:
                self._counts.setdefault(event.stack, []).append(real.sum(-1))
                self._widths[event.stack] = X.shape[-1]
            rows = metrics.drawn_tokens(X.shape[1], _POINTS, 0, X.device)
            near = metrics.nearest_neighbours(X, real, _NEIGHBOURS, rows)
            self._see_shape(place, X, real, near)
            self._see_change(place, X, real, near)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        gathered = (self._samples, self._energy, self._standardized, self._over_samples)
        return [row for one in gathered for row in one.rows()]

    @property
    def samples(self) -> Samples:
        """The numbers that every sequence has of its own."""
        return self._samples

    @property
    def shapes(self) -> dict[str, StackShape]:
        """The shape of each stack's first state."""
        found = {}
        for stack, counts in self._counts.items():
            count = torch.cat([one.cpu() for one in counts])
            found[stack] = StackShape(int(count.median()), self._widths[stack], count.numel())
        return found

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw."""
        for stack, counts in other._counts.items():
            self._counts.setdefault(stack, []).extend(counts)
        self._widths |= other._widths
        self._samples.merge(other._samples)
        self._energy.merge(other._energy)
        self._standardized.merge(other._standardized)
        self._over_samples.merge(other._over_samples)

    # ------------------------------------------------------------ one state

    def _see_tokens(self, place: Place, X: Tensor, mask: Tensor | None, scope: str) -> None:
        parts = parts_of(X, mask)
        residual = residual_of(parts)
        floor = _floor_note(residual, X.dtype)
        self._samples.add(place, "rms", rms_of(parts), scope=scope, undefined=_FEW)
        self._samples.add(place, "similarity", similarity_of(parts), scope=scope, undefined=_FEW)
        self._samples.add(place, "residual", residual, scope=scope, undefined=_FEW, note=floor)
        self._energy.add(place, parts, scope, note=floor)
        if (place.site, place.part) == ("stream", "out"):
            self._see_ranks(place, X, mask, scope, floor)

    def _see_ranks(self, place: Place, X: Tensor, mask: Tensor | None, scope: str, floor: str) -> None:
        both = metrics.both_singular_values(X, mask)
        count = real_or_all(mask, X.shape[0], X.shape[1], X.device).sum(-1)
        several = count >= 2  # every rank of a single token is 1, whatever the model does
        for prefix, sigma in zip(("", "centered_"), both, strict=True):
            ranks = metrics.ranks(sigma, tokens=count, width=X.shape[-1], dtype=X.dtype, largest=both[0][..., 0])
            for name, value in ranks.items():
                note = floor if prefix else ""  # ranks of what is left of rounding
                value = torch.where(several, value, torch.nan)
                self._samples.add(place, prefix + name, value, scope=scope, undefined=_NO_RANK, note=note)

    def _see_shape(self, place: Place, X: Tensor, real: Tensor, near: metrics.Neighbours) -> None:
        self._standardized.add(place, X, real)
        self._samples.add(place, "channel_entropy", metrics.channel_entropy(X, real))
        self._samples.add(place, "max_to_median", metrics.max_to_median(X, real))
        self._samples.add(place, "max_abs", metrics.max_abs(X, real), reduce="largest")
        self._samples.add(place, "max_abs_position", metrics.max_abs_position(X, real), reduce="mode")
        self._samples.add(place, "distinct_at_dtype", metrics.distinct_at_dtype(X, real), undefined=_FEW)
        self._samples.add(
            place,
            "intrinsic_dimension",
            metrics.intrinsic_dimension(
                X, real, scale=_NEIGHBOURS, points=_POINTS, neighbours=near if X.shape[1] <= _POINTS else None
            ),
            exact=X.shape[1] <= _POINTS,
            undefined="needs at least three different tokens",
        )

    # -------------------------------------------------- from state to state

    def _see_change(self, place: Place, X: Tensor, real: Tensor, near: metrics.Neighbours) -> None:
        kept = X.clone()  # the model may add to this tensor in place
        trail = self._trails.get(place.stack)
        if place.layer == 0 or trail is None or trail.previous.shape != X.shape:
            smaller = bool((real.sum(-1) < X.shape[-1]).any())
            self._trails[place.stack] = _Trail(kept, kept, near, metrics.row_space(X, real) if smaller else None)
            return
        self._samples.add(place, "update_share", metrics.update_share(X, trail.previous, real))
        self._samples.add(place, "neighbour_cosine", metrics.neighbour_cosine(X, trail.previous, real))
        distance = metrics.identity_distance(X, trail.first, real)
        self._samples.add(place, "identity_distance", distance, undefined=_NO_RANK)
        self._samples.add(
            place,
            "neighbourhood_overlap",
            metrics.neighbourhood_overlap(
                X, trail.previous, real, k=_NEIGHBOURS, points=_POINTS, neighbours=(near, trail.near)
            ),
            exact=X.shape[1] <= _POINTS,
            undefined="fewer real tokens than neighbours asked for",
        )
        novelty = torch.full(X.shape[:1], torch.nan)
        if trail.basis is not None:
            novelty = metrics.span_novelty(X, trail.first, real, basis=trail.basis)
        self._samples.add(
            place,
            "span_novelty",
            novelty,
            undefined="as many tokens as features: the row space of the first state is everything",
        )
        self._trails[place.stack] = _Trail(trail.first, kept, near, trail.basis)


def _some(X: Tensor, kept: Tensor, start: int, padded: bool) -> tuple[Tensor, Tensor | None]:
    """The tokens of a scope: under a mask where there is padding, else cut out, which halves the work."""
    return (X, kept) if padded else (X[:, start:], None)


def _floor_note(residual: Tensor, dtype: torch.dtype) -> str:
    if bool((residual < metrics.floor(dtype)).any()):
        return f"at the float floor of {str(dtype).removeprefix('torch.')}: differences between tokens are rounding"
    return ""
