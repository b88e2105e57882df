"""The same numbers at several lengths of the context: what is cut off, and what the rows are called.

A causal model computes its first c tokens without looking at later ones. So one pass over long sequences holds every
shorter one: what is seen of the first c tokens is what a run on these tokens alone would show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall, Event, Observer, Signal, StreamState
from fullrank.measure.positions import real_or_all
from fullrank.table import Row, headline, in_context

__all__ = ["ByPosition", "Reading", "first_tokens", "rows_in_context"]

Seen = StreamState | AttentionCall
"""What has a length to be cut: gradients of a loss over all tokens have none."""

_SITES = ("stream", "read", "attention")
"""What is taken of single tokens, and so of the first ones; weights and gradients of a loss are not."""

_TOKENS = ("late", "samples")
"""Parts of a scope that say over which tokens a number was taken; others say what was left out of them."""


def rows_in_context(rows: Sequence[Row], context: int, stacks: Collection[str]) -> list[Row]:
    """The rows of these stacks at one context, each number over the tokens of its headline.

    Args:
        rows: of a run on sequences of this many tokens.
        context: how many.
        stacks: names of the stacks that are wanted.

    Returns:
        Rows over late tokens where the number was taken over them, else over all; their scopes say the context.
    """
    wanted = [row for row in rows if row.stack in stacks and row.site in _SITES]
    scopes: dict[tuple[str, int, str, str, str], set[str]] = {}
    for row in wanted:
        scopes.setdefault(_number(row), set()).add(_tokens(row.scope))
    return [
        replace(row, scope=in_context(row.scope, context))
        for row in wanted
        if _tokens(row.scope) == headline(scopes[_number(row)])
    ]


def _number(row: Row) -> tuple[str, int, str, str, str]:
    return row.stack, row.layer, row.site, row.part, row.metric


def _tokens(scope: str) -> str:
    """`late+no-sink` → `late`, `no-sink` → `all`."""
    return next((part for part in _TOKENS if part in scope.split("+")), "all")


def first_tokens(event: Seen, context: int) -> Seen | None:
    """The event as it would be had the sequences ended after `context` real tokens.

    Valid where nothing looks ahead. Sequences with fewer real tokens are kept without any, so that every sequence stays
    in its place.

    Args:
        event: a state of the stream, or a call of self-attention.
        context: real tokens.

    Returns:
        The event of these tokens; None where no sequence has so many, or queries and keys are not the same tokens.
    """
    if isinstance(event, StreamState):
        real = _first(event.real, event.value.shape[0], event.value.shape[1], context, event.value.device)
        if real is None:
            return None
        end, kept = real
        return replace(event, value=event.value[:, :end], real=kept)
    sequences, _, queries, keys = event.attention.shape
    if queries != keys or not event.part.startswith("self"):
        return None
    real = _first(event.real_queries, sequences, queries, context, event.attention.device)
    if real is None:
        return None
    end, kept = real
    return replace(
        event,
        attention=event.attention.leading(end),
        value=None if event.value is None else event.value[..., :end, :],
        real_queries=kept,
        real_keys=kept,
    )


def _first(
    real: Tensor | None, sequences: int, tokens: int, context: int, device: torch.device
) -> tuple[int, Tensor | None] | None:
    """Where the first `context` real tokens of every sequence end, and which they are (None: all up to there)."""
    if real is None:
        return None if tokens < context else (context, None)
    real = real_or_all(real, sequences, tokens, device)
    position = real.cumsum(-1)  # 1 for the first real token
    kept = real & (position <= context) & (position[:, -1:] >= context)
    places = kept.any(0).nonzero()
    if not places.numel():
        return None
    end = int(places[-1]) + 1
    return end, kept[:, :end]


@dataclass(eq=False)
class Reading:
    """What was seen at one context.

    Attributes:
        context: real tokens.
        observers: what saw them.
        places: by stack, for each batch that was seen, which sequences its first, second, … are; numbered on over all
            batches, those included that were not seen at this context.
        stacks: names of the stacks whose rows are of this context.
    """

    context: int
    observers: Sequence[Observer]
    places: dict[str, list[Tensor]] = field(default_factory=dict)
    stacks: Collection[str] = field(default_factory=frozenset)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of this context, taken when they are first asked for."""
        return rows_in_context([row for one in self.observers for row in one.rows()], self.context, self.stacks)


class ByPosition:
    """Shows observers what the first tokens of every event are, at each of several contexts.

    Args:
        contexts: real tokens, rising.
        make: makes the observers of one context.
        whole: a context that all sequences have exactly: events of that length are left to those who see them anyway.
        tried: the batch whose states are kept.

    Attributes:
        readings: what was seen, by context.
        places: by stack, the numbers of each batch's sequences.
        untouched: names of the stacks of which every batch was left to others at the context `whole`.
        states: the first tokens of the batch `tried` after each stack's last block so far, as many as the shortest
            context.
    """

    def __init__(
        self, contexts: Sequence[int], make: Callable[[], list[Observer]], *, whole: int | None = None, tried: int = 0
    ) -> None:
        self.readings = [Reading(context, make()) for context in contexts]
        self.places: dict[str, list[Tensor]] = {}
        self.states: dict[str, Tensor] = {}
        self._left: dict[str, int] = {}
        self._shortest = min(contexts)
        self._whole = whole
        self._tried = tried
        self.needs: frozenset[Signal] = frozenset().union(*(one.needs for one in self.readings[0].observers))

    @property
    def untouched(self) -> frozenset[str]:
        """Stacks of which nothing was cut at the longest context."""
        return frozenset(stack for stack, count in self._left.items() if count == len(self.places.get(stack, ())))

    def see(self, event: Event) -> None:
        """Cut the event to every context and hand it on."""
        if not isinstance(event, Seen):
            return
        begins = isinstance(event, StreamState) and (event.layer, event.site, event.part) == (0, "stream", "out")
        if isinstance(event, StreamState) and begins:
            self._begin(event)
        self._keep(event)
        for reading in self.readings:
            if reading.context == self._whole and _length(event) == self._whole:
                self._left[event.stack] = self._left.get(event.stack, 0) + begins
                continue
            cut = first_tokens(event, reading.context)
            if begins and cut is not None:
                reading.places.setdefault(event.stack, []).append(self.places[event.stack][-1])
            if cut is not None:
                for observer in reading.observers:
                    if _signal(cut) in observer.needs:
                        observer.see(cut)

    def rows(self) -> list[Row]:
        """None: who asked for the contexts takes the readings."""
        return []

    def merge(self, other: Self) -> None:
        """Take in what was seen in other batches, context by context."""
        before = {stack: sum(map(len, places)) for stack, places in self.places.items()}
        for mine, theirs in zip(self.readings, other.readings, strict=True):
            _append(mine.places, theirs.places, before)
            for observer, one in zip(mine.observers, theirs.observers, strict=True):
                observer.merge(one)
        _append(self.places, other.places, before)
        for stack, count in other._left.items():
            self._left[stack] = self._left.get(stack, 0) + count

    def _begin(self, event: StreamState) -> None:
        earlier = self.places.setdefault(event.stack, [])
        start = sum(map(len, earlier))
        earlier.append(torch.arange(start, start + event.value.shape[0]))

    def _keep(self, event: Seen) -> None:
        if not isinstance(event, StreamState) or (event.site, event.part) != ("stream", "out"):
            return
        if len(self.places.get(event.stack, ())) == self._tried + 1:
            cut = first_tokens(event, self._shortest)
            if isinstance(cut, StreamState):
                self.states[event.stack] = (cut.value if cut.real is None else cut.value[cut.real]).clone()


def _append(places: dict[str, list[Tensor]], others: dict[str, list[Tensor]], before: dict[str, int]) -> None:
    for stack, one in others.items():
        places.setdefault(stack, []).extend(numbers + before.get(stack, 0) for numbers in one)


def _length(event: Seen) -> int | None:
    """How many real tokens each sequence has, where they have all equally many and nothing else."""
    if isinstance(event, StreamState):
        return event.value.shape[1] if event.real is None or bool(event.real.all()) else None
    alone = event.real_queries is None or bool(event.real_queries.all())
    return event.attention.shape[2] if alone and event.attention.shape[2] == event.attention.shape[3] else None


def _signal(event: Seen) -> Signal:
    if isinstance(event, AttentionCall):
        return "attention"
    return "read" if event.site == "read" else "mid" if event.part == "mid" else "stream"
