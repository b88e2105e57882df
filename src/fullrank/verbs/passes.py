"""Running the model's calls under the recorder, and telling its faults from ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from fullrank.capture import Anatomy, Recorder, survey
from fullrank.capture.events import Event, Observer, Signal, StreamState
from fullrank.capture.finite import first_nonfinite_module, first_nonfinite_parameter
from fullrank.capture.survey import Forward, watch
from fullrank.errors import BatchError, FullrankError, NonFiniteError
from fullrank.table import Row
from fullrank.verbs.batches import Call
from fullrank.verbs.ranks import Attempt, Ranks

__all__ = ["Finite", "Progress", "anatomy_of", "record", "require_finite_weights", "stretch", "watched"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all that is done, from 0 to 1."""


def stretch(tell: Progress, low: float, high: float) -> Progress:
    """Progress whose 0 to 1 is a part of somebody's."""
    return lambda what, share: tell(what, low + (high - low) * share)


RunCall = Callable[[Call, Recorder], list[str]]
"""Runs one call under an entered recorder; gives sentences about what could not be had."""


def require_finite_weights(model: nn.Module) -> None:
    """Refuse a model with a NaN or an infinity among its parameters.

    Raises:
        NonFiniteError: naming the first of them.
    """
    name = first_nonfinite_parameter(model)
    if name is not None:
        raise NonFiniteError(f"the weights are not finite: the first NaN or infinity is in {name!r}.")


def anatomy_of(model: nn.Module, calls: Sequence[Call], ranks: Ranks, *, blocks: str | None = None) -> Anatomy:
    """One forward that finds the blocks; what a batch that does not fit makes the model say becomes one sentence."""
    first = calls[0].for_survey()

    def look() -> Anatomy:
        with _clear_errors(model, first, again=not ranks.sharded):
            return survey(model, lambda: first.run(model), blocks=blocks)

    if ranks.sharded:
        ranks.same(len(calls), "batch: the parts of a sharded model's batch hold different numbers of batches.")
    anatomy = ranks.agree(look)
    ranks.same(anatomy.stacks, "batch: the processes see different blocks; give each a part of the same kind.")
    return anatomy


def watched(model: nn.Module, call: Call) -> Forward:
    """As `anatomy_of`, of one call and with the lineage of its forward."""
    first = call.for_survey()
    with _clear_errors(model, first):
        return watch(model, lambda: first.run(model))


def record(
    model: nn.Module,
    calls: Sequence[Call],
    anatomy: Anatomy,
    observers: Sequence[Observer],
    tell: Progress,
    ranks: Ranks | None = None,
    run_call: RunCall | None = None,
) -> list[str]:
    """Run every call once, feeding the observers.

    Args:
        model: in the state it is to be looked at (see `undisturbed`).
        calls: what it is called with.
        anatomy: what the survey found.
        observers: what takes the events.
        tell: hears of every block.
        ranks: the processes that do the same on their parts; by default this one alone.
        run_call: runs one call under its recorder, as for gradients; by default one plain forward.

    Returns:
        Sentences about what was not seen, or seen on another path.
    """

    def plain(call: Call, recorder: Recorder) -> list[str]:
        call.run(model)
        return []

    forward = run_call or plain
    layers = sum(len(stack.paths) for stack in anatomy.stacks)
    notes = dict.fromkeys(anatomy.notes)
    together = ranks or Ranks()
    faults: list[Exception] = []
    if together.sharded:  # a forward that ended early here would keep the other processes waiting
        observers = [Attempt(observer, faults) for observer in observers]

    def run(index: int, call: Call) -> None:
        before = [0]

        def step(stack: str, layer: int, of: int) -> None:
            before[0] += 1
            share = (index + min(before[0], layers) / layers) / len(calls)
            where = f"{stack} layer {layer} of {of}"
            tell(where if len(calls) == 1 else f"batch {index + 1} of {len(calls)}, {where}", share)

        with (
            _locate_nonfinite(model, call),
            Recorder(
                model, observers, anatomy=anatomy, real=call.real, documents=call.documents, progress=step
            ) as recorder,
        ):
            said = forward(call, recorder)
        notes.update(dict.fromkeys([*recorder.notes, *said]))

    def run_all() -> None:
        for index, call in enumerate(calls):
            run(index, call)

    if together.sharded:
        for index, call in enumerate(calls):
            together.agree(partial(run, index, call))
            _settle(faults, model, call, together)
    else:
        together.agree(run_all)
    return list(notes)


# ---------------------------------------------------------------- faults


_NOT_FINITE = "the activations are not finite: the first NaN or infinity comes out of {!r}."


class _NotFiniteHere(Exception):  # noqa: N818 — a signal between the observer and the verb, never shown
    """The stream stopped being finite."""


class Finite:
    """Ends the forward as soon as the stream is not finite."""

    needs: frozenset[Signal] = frozenset({"stream"})

    def see(self, event: Event) -> None:
        """Look at one state."""
        if not isinstance(event, StreamState):
            return
        # what stands at padded tokens is the kernel's own affair: some leave NaN where a query sees no key
        states = event.value if event.real is None else event.value[event.real]
        if not bool(torch.isfinite(states).all()):
            raise _NotFiniteHere(event.path)

    def rows(self) -> list[Row]:
        """No numbers come of this."""
        return []

    def merge(self, other: Finite) -> None:
        """There is nothing to merge."""


def _settle(faults: list[Exception], model: nn.Module, call: Call, ranks: Ranks) -> None:
    """Raise what failed during a forward that had to go on to its end."""
    stop = next((fault for fault in faults if isinstance(fault, _NotFiniteHere)), None)
    lost = any(ranks.gathered(stop is not None))
    where = first_nonfinite_module(model, lambda: call.run(model)) if lost else None  # a forward of all processes

    def verdict() -> None:
        if stop is not None:
            raise NonFiniteError(_NOT_FINITE.format(where or str(stop)))
        for fault in faults:
            raise fault

    ranks.agree(verdict)


@contextmanager
def _locate_nonfinite(model: nn.Module, call: Call) -> Iterator[None]:
    try:
        yield
    except _NotFiniteHere as stop:
        where = first_nonfinite_module(model, lambda: call.run(model)) or str(stop)
        raise NonFiniteError(_NOT_FINITE.format(where)) from None


@contextmanager
def _clear_errors(model: nn.Module, call: Call, *, again: bool = True) -> Iterator[None]:
    # What a model says to a batch that does not fit becomes one sentence; a fault of ours passes as what it is. Which
    # of the two it is cannot be read off the traceback, since observed functions are called from here: so the model is
    # called once more, unobserved, and is to blame if that fails too; not where other processes would have to join in.
    try:
        yield
    except (FullrankError, _NotFiniteHere):
        raise
    except Exception as error:
        fault = _fault_of(model, call) if again else error
        if fault is None:
            raise
        first = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise BatchError(
            f"the batch does not fit {type(model).__name__} (called with {call.describe()}): {first}"
        ) from error


def _fault_of(model: nn.Module, call: Call) -> Exception | None:
    try:
        with torch.no_grad():
            call.run(model)
    except Exception as fault:  # noqa: BLE001 - whatever the model raises is its answer
        return fault
    return None
