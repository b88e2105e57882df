"""One model at several contexts: read off one long pass where nothing looks ahead, else run at each length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy
from fullrank.capture.anatomy import Stack
from fullrank.capture.events import Event, Observer, Signal, StreamState
from fullrank.errors import BatchError
from fullrank.measure.contexts import ByPosition, Reading
from fullrank.measure.slopes import slopes
from fullrank.table import Row, Slope
from fullrank.verbs.batches import Call
from fullrank.verbs.cutting import Length, cut, length_of
from fullrank.verbs.passes import Progress, record
from fullrank.verbs.token_losses import loss_readings

__all__ = ["ByContext", "ContextPlan"]

_TOLERANCE = 1e-3  # relative: what another order of summation may change in float32 over a deep stack


class ByContext(NamedTuple):
    """What the contexts gave: rows whose scope says theirs, slopes, and sentences for the reader of the report."""

    rows: list[Row]
    slopes: list[Slope]
    notes: list[str]


class ContextPlan:
    """How the contexts of one examination are read.

    A model whose stacks are all causal and read nothing but their own tokens is run once, on the whole sequences, and
    read by position; that a run on the first tokens alone gives the same states is tried out on the first batch. Every
    other model is run at each length on the same sequences, cut. Stacks whose length stays (the images beside a text)
    have no rows by context.

    Args:
        contexts: from `asked.checked_contexts`.
        calls: what the model is called with.
        anatomy: its stacks.
        make: makes the observers of one context.
        closing: how many special tokens end every sequence.

    Raises:
        BatchError: where the batch holds no sequences, or none that is as long as a context.
    """

    def __init__(
        self,
        contexts: tuple[int, ...],
        calls: Sequence[Call],
        anatomy: Anatomy,
        make: Callable[[], list[Observer]],
        *,
        closing: int = 0,
    ) -> None:
        self._seen = _Lengths()
        self._by_position: ByPosition | None = None
        self.contexts, self.calls, self.anatomy, self._make, self._closing = contexts, calls, anatomy, make, closing
        if not contexts:
            return
        tokens_first = any(stack.layout.tokens_first for stack in anatomy.stacks)
        found = [length_of(call, tokens_first=tokens_first) for call in calls]
        self._lengths: list[Length] = [one for one in found if one is not None]
        if len(self._lengths) < len(calls):
            raise BatchError(f"contexts= cuts sequences of tokens; this batch holds none ({calls[0].describe()}).")
        if any(call.past for call in calls) or any(call.documents is not None for call in calls):
            raise BatchError("contexts= reads whole sequences, one per row: pass no cache and no packed documents.")
        counts = torch.cat([length.counts for length in self._lengths])
        if int(counts.max()) < contexts[-1]:
            raise BatchError(
                f"contexts= asks for {contexts[-1]} tokens; the longest sequence of the batch has {int(counts.max())}."
            )
        self._whole = contexts[-1] if bool((counts == contexts[-1]).all()) else None
        self._tried = max(range(len(calls)), key=lambda index: int(self._lengths[index].counts.max()))
        causal = any(map(_causal, anatomy.stacks))
        if causal:
            self._by_position = ByPosition(contexts, make, whole=self._whole, tried=self._tried)

    @property
    def observers(self) -> list[Observer]:
        """What has to see the long pass, beside the observers of the whole sequences."""
        return [] if not self.contexts else [self._seen, *([] if self._by_position is None else [self._by_position])]

    def finish(self, model: nn.Module, observers: Sequence[Observer], tell: Progress) -> ByContext:
        """After the long pass: run what has to be run, take the loss by position, and put the contexts together.

        Args:
            model: in the state in which it was looked at.
            observers: those of the whole sequences.
            tell: hears of what is done.

        Returns:
            Rows, slopes and notes; nothing where no contexts were asked for.
        """
        readings, notes = self.readings(model, observers, tell)
        seen = {name for reading in readings for name in reading.stacks}
        predicting = [stack for stack in self.anatomy.stacks if stack.name in seen and _causal(stack)]
        if len(predicting) == 1:
            tell("the loss by position", 1.0)
            readings += loss_readings(model, self.calls, predicting[0], self.contexts)
        return ByContext([row for reading in readings for row in reading.rows], slopes(readings), notes)

    def readings(
        self, model: nn.Module, observers: Sequence[Observer], tell: Progress
    ) -> tuple[list[Reading], list[str]]:
        """As `finish`, each context by itself: what a reference is read for, of which nobody asks a slope.

        Args:
            model: in the state in which it was looked at.
            observers: those of the whole sequences.
            tell: hears of what is done.

        Returns:
            What was seen at each context, and notes.
        """
        if not self.contexts:
            return [], []
        notes: list[str] = []
        short = self._probe(model, tell)
        moving = [
            s
            for s in self.anatomy.stacks
            if s.name in short.lengths and short.lengths[s.name][0] != self._seen.lengths[s.name][self._tried]
        ]
        still = [s.name for s in self.anatomy.stacks if s not in moving]
        if still:
            notes.append(f"{', '.join(still)}: as long at every context, so without rows by context.")
        names = frozenset(stack.name for stack in moving)
        if self._by_position is not None and all(map(_causal, moving)):
            apart = self._difference(short)
            if apart is None:
                notes.append(self._said(f"read by position in one pass over {self._longest()} tokens"))
                return self._read_by_position(self._by_position, observers, names), notes
            notes.append(
                f"the first {self.contexts[0]} tokens alone give other states than within {self._longest()} tokens "
                f"(relative difference {apart:.1e}): every context was run on its own."
            )
        notes.append(self._said("run at each length on the same sequences, cut"))
        return self._run_each(model, observers, names, tell), notes

    def _said(self, how: str) -> str:
        return f"contexts {', '.join(map(str, self.contexts))}: {how}."

    def _longest(self) -> int:
        return max(int(length.counts.max()) for length in self._lengths)

    # ------------------------------------------------------------ one pass

    def _read_by_position(
        self, seen: ByPosition, observers: Sequence[Observer], stacks: frozenset[str]
    ) -> list[Reading]:
        readings = []
        for reading in seen.readings:
            untouched = seen.untouched & stacks if reading.context == self._whole else frozenset()
            reading.stacks = stacks - untouched
            readings.append(reading)
            if untouched:
                readings.append(Reading(reading.context, observers, seen.places, untouched))
        return readings

    def _difference(self, short: _Lengths) -> float | None:
        """By how much the states after the last blocks differ, relative; None where that may be rounding."""
        assert self._by_position is not None
        for stack, ours in self._by_position.states.items():
            alone = short.states.get(stack)
            if alone is None:
                continue
            alone, ours = alone.double().flatten(0, -2), ours.double().flatten(0, -2)
            if alone.shape != ours.shape:
                continue  # a stack that holds other tokens besides: there is nothing to compare token by token
            apart = float((alone - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float64).tiny))
            if not apart <= max(_TOLERANCE, 16 * torch.finfo(short.states[stack].dtype).eps):
                return apart
        return None

    def _probe(self, model: nn.Module, tell: Progress) -> _Lengths:
        """What the streams of one batch are at the shortest context."""
        made = cut(self.calls[self._tried], self._lengths[self._tried], self.contexts[0])
        assert made is not None  # the longest sequence is in this batch
        seen = _Lengths(states=True)
        record(model, [made[0]], self.anatomy, [seen], tell)
        return seen

    # ------------------------------------------------------------ a run each

    def _run_each(
        self, model: nn.Module, observers: Sequence[Observer], stacks: frozenset[str], tell: Progress
    ) -> list[Reading]:
        readings = []
        starts = [sum(one.sequences for one in self._lengths[:index]) for index in range(len(self.calls))]
        for context in self.contexts:
            if context == self._whole and all(one.decoder_places <= context for one in self._lengths):
                places = [torch.arange(s, s + one.sequences) for s, one in zip(starts, self._lengths, strict=True)]
                seen, counted = observers, self._seen
            else:
                made = [self._cut(index, context) for index in range(len(self.calls))]
                places = [one[1] + start for one, start in zip(made, starts, strict=True) if one is not None]
                seen, counted = self._make(), _Lengths()
                calls = [one[0] for one in made if one is not None]
                record(model, calls, self.anatomy, [*seen, counted], _at(tell, context))
            reached = frozenset(stack for stack in stacks if min(counted.lengths.get(stack, [0])) >= context)
            readings.append(Reading(context, seen, dict.fromkeys(reached, places), reached))
        return readings

    def _cut(self, index: int, context: int) -> tuple[Call, Tensor] | None:
        return cut(self.calls[index], self._lengths[index], context, closing=self._closing)


def _causal(stack: Stack) -> bool:
    """Whether what a block does to a token follows from this stack's tokens up to it."""
    parts = [part for block in stack.calls for part in block]
    return stack.causal and bool(parts) and not any(part.startswith("cross") for part in parts)


def _at(tell: Progress, context: int) -> Progress:
    return lambda what, share: tell(f"context {context}, {what}", share)


class _Lengths:
    """How many tokens each stack has, batch by batch, and where asked the states after its last block so far."""

    needs: frozenset[Signal] = frozenset({"stream"})

    def __init__(self, *, states: bool = False) -> None:
        self.lengths: dict[str, list[int]] = {}
        self.states: dict[str, Tensor] = {}
        self._keep = states

    def see(self, event: Event) -> None:
        """Look at one state."""
        if not isinstance(event, StreamState) or (event.site, event.part) != ("stream", "out"):
            return
        if event.layer == 0:
            self.lengths.setdefault(event.stack, []).append(event.value.shape[1])
        if self._keep:
            self.states[event.stack] = event.value.clone()

    def rows(self) -> list[Row]:
        """No numbers come of this."""
        return []

    def merge(self, other: Any) -> None:
        """There is nothing to merge."""
