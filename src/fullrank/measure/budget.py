"""A time budget: what is sampled where the time is too short for everything, in a stated order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from fullrank.capture.events import Event, Observer, Signal, StreamState
from fullrank.errors import ShapeError
from fullrank.measure.spectra import SpectrumObserver
from fullrank.table import Row

__all__ = ["Budget", "Clock", "Costs", "EvenHeads", "OutOfTime", "Sampling", "Shedding", "Stop", "Timed", "sampling"]

Clock = Callable[[], float]
"""Seconds from some moment on."""

_LEFT_OUT = "left out: the time budget had run out"


class OutOfTime(Exception):  # noqa: N818 - a signal between an observer and the verb, never shown
    """The forward is left: its time is over, or enough of it was seen."""


class Budget:
    """Seconds that an examination may take from now on.

    Args:
        seconds: how many; more than 0.
        clock: tells the time.

    Raises:
        ShapeError: for a budget that is no time at all.
    """

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        if not isinstance(seconds, int | float) or not seconds > 0 or seconds == float("inf"):
            raise ShapeError(f"seconds={seconds!r} is no time budget; pass a number above 0, such as 30.")
        self.seconds = float(seconds)
        self.clock = clock or time.perf_counter
        self._started = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 where the budget is overdrawn."""
        return self.seconds - (self.clock() - self._started)

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0


class Costs(NamedTuple):
    """What one more of each thing costs, in seconds, and how much of it there would be.

    Attributes:
        sequence: a sequence's forward, token metrics and attention rows, over all blocks.
        head: the singular values of one head in every block, for one sequence.
        sequences: how many sequences there are.
        spectra: of how many of them singular values would be taken.
        heads: of how many heads of a call.
    """

    sequence: float
    head: float
    sequences: int
    spectra: int
    heads: int


@dataclass(frozen=True)
class Sampling:
    """What is taken.

    Attributes:
        sequences: how many sequences there is time for, at least one.
        spectra: of how many of these singular values are taken.
        heads: of how many heads of each call, evenly spread; None for all.
    """

    sequences: int
    spectra: int
    heads: int | None = None

    def lowered(self, costs: Costs) -> list[str]:
        """Which singular values are not taken that would have been, in words."""
        said = []
        if self.spectra == 0 and costs.spectra:
            said.append("no singular values")
        elif self.spectra < costs.spectra:
            said.append(f"singular values of {self.spectra} instead of {costs.spectra} sequences")
        if self.spectra and self.heads is not None:
            said.append(f"of {self.heads} instead of {costs.heads} heads of each call")
        return said


def sampling(costs: Costs, seconds: float, *, heads_chosen: bool = False) -> Sampling:
    """The most that fits into the time, given up in this order.

    1. singular values of one sequence instead of several,
    2. of fewer heads, evenly spread (not where the user chose the heads),
    3. no singular values,
    4. fewer sequences; one is always read: its stream and its attention rows.

    Args:
        costs: estimates.
        seconds: what is left.
        heads_chosen: whether the heads were named by the user.

    Returns:
        What is taken; with more time never less.
    """
    plain = costs.sequences * costs.sequence
    spare = seconds - plain
    whole = costs.heads * costs.head
    if costs.spectra and spare >= costs.spectra * whole:
        return Sampling(costs.sequences, costs.spectra)
    if costs.spectra and spare >= whole:
        return Sampling(costs.sequences, 1)
    fit = int(spare / costs.head) if costs.head > 0 and spare > 0 else 0
    if costs.spectra and not heads_chosen and fit >= 1:
        return Sampling(costs.sequences, 1, min(fit, costs.heads))
    if spare >= 0:
        return Sampling(costs.sequences, 0)
    return Sampling(max(1, min(costs.sequences, int(seconds / costs.sequence))), 0)


@dataclass(frozen=True)
class EvenHeads:
    """So many heads of every call, evenly spread.

    Attributes:
        most: how many.
    """

    most: int

    def of(self, stack: str, layer: int, heads: int) -> tuple[int, ...]:
        """The chosen heads of one attention call, rising."""
        count = min(self.most, heads)
        return tuple(sorted({round((index + 0.5) * heads / count - 0.5) for index in range(count)}))


class Timed:
    """An observer and the time that it takes.

    Args:
        observer: does the work.
        clock: tells the time.

    Attributes:
        seconds: of what every block has.
        once: of the state before the first block.
    """

    def __init__(self, observer: Observer, clock: Clock) -> None:
        self.observer, self.clock = observer, clock
        self.needs: frozenset[Signal] = observer.needs
        self.seconds = self.once = 0.0

    def see(self, event: Event) -> None:
        """Take the time of one event."""
        _finish(event)
        began = self.clock()
        self.observer.see(event)
        _finish(event)
        spent = self.clock() - began
        if isinstance(event, StreamState) and event.site == "stream" and event.layer == 0:
            self.once += spent
        else:
            self.seconds += spent

    def rows(self) -> Sequence[Row]:
        """The observer's."""
        return self.observer.rows()

    def merge(self, other: Self) -> None:
        """Merge the observers and add up the time."""
        self.observer.merge(other.observer)
        self.seconds += other.seconds
        self.once += other.once


def _finish(event: Event) -> None:
    """Wait for an accelerator: its work is timed, not the asking for it."""
    value = getattr(event, "value", None)
    if value is not None and value.device.type == "cuda":
        torch.cuda.synchronize(value.device)


class Shedding:
    """Singular values while there is time: asked before every call, so that an estimate that was wrong costs one call.

    Args:
        observer: takes them.
        budget: says when it is over.

    Attributes:
        shed: of how many calls none were taken.
        seconds: that the others took.
    """

    def __init__(self, observer: SpectrumObserver, budget: Budget) -> None:
        self.observer, self.budget = observer, budget
        self.needs: frozenset[Signal] = observer.needs
        self.shed = 0
        self.seconds = 0.0

    def see(self, event: Event) -> None:
        """Take the spectra of a call, or say why not."""
        if self.budget.over:
            self.shed += 1
            self.observer.pass_over(event, _LEFT_OUT)
            return
        before = self.budget.left
        self.observer.see(event)
        self.seconds += before - self.budget.left

    def rows(self) -> Sequence[Row]:
        """The observer's."""
        return self.observer.rows()

    def merge(self, other: Self) -> None:
        """Merge the observers."""
        self.observer.merge(other.observer)
        self.shed += other.shed
        self.seconds += other.seconds


class Stop:
    """Ends a forward after a block: where the budget is over, or after the first block where it is only tried out.

    Args:
        budget: says when it is over; None to stop after the first block.

    """

    needs: frozenset[Signal] = frozenset({"stream"})

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget

    def see(self, event: Event) -> None:
        """Look at the clock after a block.

        Raises:
            OutOfTime: where the forward is to end here.
        """
        if not isinstance(event, StreamState) or event.layer == 0:
            return
        if self.budget is None or self.budget.over:
            raise OutOfTime(event.path)

    def rows(self) -> list[Row]:
        """None: nothing is measured."""
        return []

    def merge(self, other: Self) -> None:
        """There is nothing to merge."""
