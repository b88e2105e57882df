"""examine: what happens inside this model now."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy, Recorder, survey, undisturbed
from fullrank.capture.events import Event, Observer, Signal, StreamState
from fullrank.capture.finite import first_nonfinite_module, first_nonfinite_parameter
from fullrank.errors import BatchError, FullrankError, NonFiniteError
from fullrank.measure import AttentionObserver, FreedMemory, SpectrumObserver, StreamObserver, gaussian_nulls
from fullrank.measure.summaries import Summaries
from fullrank.report import HeadSpectrum, Report
from fullrank.spec import Inputs, Subject, inputs, load, subject_of
from fullrank.table import Row, Table
from fullrank.verbs.batches import Call, as_calls

__all__ = ["Progress", "examine"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all that is done, from 0 to 1."""


def examine(
    model: nn.Module | str | Subject,
    batch: Any = None,
    *,
    mask: Tensor | None = None,
    spectrum: bool = True,
    blocks: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Measure what becomes of the signal in a model: over depth, over context, over heads.

    The model is run in evaluation mode on the batch, on its own kernels, and is left exactly as it was: parameters,
    buffers, gradients, training flags, random state, hooks and registries.

    Args:
        model: a module, a SPEC (hub id, directory, `arch:…`, `config.json`, `python:…`) or what `spec.load` gave.
        batch: what the model is called with: a mapping becomes keyword arguments, a tuple positional ones, a tensor the
            only one; an iterable of these is accumulated. By default, eight documents of the text that ships with the
            package where the model has a tokenizer, else random tokens or synthetic images.
        mask: (sequences, tokens), which tokens are real; by default `attention_mask` in the batch.
        spectrum: also take the singular values of every attention map; this is the dear part at long contexts.
        blocks: path of the list of blocks (`transformer.h`), where they are not found by themselves.
        seed: for the default batch and for starting blocks of the iterations.
        progress: called with a few words and the share done.

    Returns:
        The report: every number with its scope, its standard error over sequences and whether it is exact.

    Raises:
        BatchError: where the batch does not fit the model.
        NonFiniteError: where weights or activations are not finite; names the first module.
        FullrankError: for other bad input; see its subclasses.
    """
    started = time.perf_counter()
    subject = _subject(model, seed)
    given = _inputs(subject, batch, seed)
    network = subject.model
    _require_finite_weights(network)
    if given is None:
        calls = as_calls(network, batch, mask)
    else:
        calls = as_calls(network, list(given.batches), mask, known=given.real)
    tell = progress or (lambda what, share: None)
    with undisturbed(network):
        tell("finding the blocks", 0.0)
        with _clear_errors(network, calls[0]):
            anatomy = survey(network, lambda: calls[0].run(network), blocks=blocks)
        observers = _observers(anatomy, spectrum=spectrum, seed=seed)
        notes = _record(network, calls, anatomy, observers, tell)
    rows = [row for observer in observers for row in observer.rows()]
    about = _about(subject, given, calls, anatomy, notes) | {
        "nulls": _nulls(anatomy, observers, seed),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Report(rows=Table(rows), about=about, spectra=_spectra(observers))


# ---------------------------------------------------------------- before


def _subject(model: nn.Module | str | Subject, seed: int) -> Subject:
    if isinstance(model, Subject):
        return model
    if isinstance(model, str):
        return load(model, seed=seed)
    if isinstance(model, nn.Module):
        return subject_of(model)
    raise BatchError(f"model={type(model).__name__} is neither a module nor a SPEC.")


def _inputs(subject: Subject, batch: Any, seed: int) -> Inputs | None:
    if isinstance(batch, Inputs):
        return batch
    if batch is None:
        return inputs(subject, seed=seed)
    return None


def _require_finite_weights(model: nn.Module) -> None:
    name = first_nonfinite_parameter(model)
    if name is not None:
        raise NonFiniteError(f"the weights are not finite: the first NaN or infinity is in {name!r}.")


def _observers(anatomy: Anatomy, *, spectrum: bool, seed: int) -> list[Observer]:
    causal = [stack.name for stack in anatomy.stacks if stack.causal]
    summaries = Summaries()
    observers: list[Observer] = [_Finite(), StreamObserver(causal=causal), AttentionObserver(summaries)]
    if spectrum:
        observers.append(SpectrumObserver(summaries, seed=seed))
    # freed memory is given back after each observer, before the next one asks for blocks of other sizes
    return [one for observer in observers for one in (observer, FreedMemory())]


# ---------------------------------------------------------------- during


class _NotFiniteHere(Exception):  # noqa: N818 — a signal between the observer and the verb, never shown
    """The stream stopped being finite."""


class _Finite:
    """Ends the forward as soon as the stream is not finite."""

    needs: frozenset[Signal] = frozenset({"stream"})

    def see(self, event: Event) -> None:
        if not isinstance(event, StreamState):
            return
        # what stands at padded tokens is the kernel's own affair: some leave NaN where a query sees no key
        states = event.value if event.real is None else event.value[event.real]
        if not bool(torch.isfinite(states).all()):
            raise _NotFiniteHere(event.path)

    def rows(self) -> list[Row]:
        return []

    def merge(self, other: _Finite) -> None:
        """There is nothing to merge."""


def _record(
    model: nn.Module, calls: list[Call], anatomy: Anatomy, observers: list[Observer], tell: Progress
) -> list[str]:
    layers = sum(len(stack.paths) for stack in anatomy.stacks)
    notes = dict.fromkeys(anatomy.notes)
    for index, call in enumerate(calls):
        before = [0]

        def step(stack: str, layer: int, of: int, index: int = index, before: list[int] = before) -> None:
            before[0] += 1
            share = (index + min(before[0], layers) / layers) / len(calls)
            where = f"{stack} layer {layer} of {of}"
            tell(where if len(calls) == 1 else f"batch {index + 1} of {len(calls)}, {where}", share)

        with (
            _locate_nonfinite(model, call),
            Recorder(model, observers, anatomy=anatomy, real=call.real, progress=step) as recorder,
        ):
            call.run(model)
        notes.update(dict.fromkeys(recorder.notes))
    return list(notes)


@contextmanager
def _locate_nonfinite(model: nn.Module, call: Call) -> Iterator[None]:
    try:
        yield
    except _NotFiniteHere as stop:
        where = first_nonfinite_module(model, lambda: call.run(model)) or str(stop)
        raise NonFiniteError(
            f"the activations are not finite: the first NaN or infinity comes out of {where!r}."
        ) from None


@contextmanager
def _clear_errors(model: nn.Module, call: Call) -> Iterator[None]:
    # What a model says to a batch that does not fit becomes one sentence; a fault of ours passes as what it is. Which
    # of the two it is cannot be read off the traceback, since observed functions are called from here: so the model is
    # called once more, unobserved, and is to blame if that fails too.
    try:
        yield
    except (FullrankError, _NotFiniteHere):
        raise
    except Exception as error:
        fault = _fault_of(model, call)
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


# ---------------------------------------------------------------- after


def _nulls(anatomy: Anatomy, observers: list[Observer], seed: int) -> dict[str, dict[str, float]]:
    """What Gaussian tokens of each stack's shape give, by stack and metric."""
    causal = {stack.name: stack.causal for stack in anatomy.stacks}
    shapes = next(observer.shapes for observer in observers if isinstance(observer, StreamObserver))
    return {stack: gaussian_nulls(shape, causal=causal[stack], seed=seed) for stack, shape in shapes.items()}


def _spectra(observers: list[Observer]) -> tuple[HeadSpectrum, ...]:
    found = (one for observer in observers if isinstance(observer, SpectrumObserver) for one in observer.spectra())
    return tuple(HeadSpectrum(one.place.stack, one.place.layer, one.place.part, *one[1:]) for one in found)


def _sum(told: int | None, calls: list[Call]) -> int | None:
    counts = [call.tokens for call in calls]
    return told if told is not None else None if None in counts else sum(count or 0 for count in counts)


def _about(
    subject: Subject, given: Inputs | None, calls: list[Call], anatomy: Anatomy, notes: list[str]
) -> dict[str, Any]:
    model = subject.model
    first = next(model.parameters(), torch.empty(0))
    return {
        "model": subject.name,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "fresh": subject.fresh,
        "stacks": [
            {
                "name": stack.name,
                "blocks": len(stack.paths),
                "heads": stack.heads,
                "width": stack.width,
                "causal": stack.causal,
                "path": stack.paths[0] if stack.paths else "",
            }
            for stack in anatomy.stacks
        ],
        "input": {
            "kind": given.kind if given else "batch",
            "description": given.description if given else "the batch that was passed",
            "sequences": sum(call.sequences for call in calls),
            "tokens": _sum(given.tokens if given else None, calls),
        },
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "notes": [*subject.notes, *notes],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
