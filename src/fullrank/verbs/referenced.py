"""The numbers of the same architecture at its own initialisation, on the same batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fullrank.capture import Anatomy, Stack, undisturbed
from fullrank.capture.events import Observer
from fullrank.errors import FullrankError
from fullrank.measure import AttentionObserver, FreedMemory, HeadObserver, StreamObserver
from fullrank.measure.summaries import Summaries
from fullrank.measure.weights import weight_rows
from fullrank.table import Row
from fullrank.verbs.batches import Call
from fullrank.verbs.contexts import ContextPlan
from fullrank.verbs.gradients import Backwards, gradient_observers
from fullrank.verbs.lent import Followed, is_lent
from fullrank.verbs.passes import Finite, Progress, anatomy_of, record
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.statistics import statistics_notes

__all__ = ["reference_rows"]

_SOURCE = "initialisation"


def reference_rows(
    twin: nn.Module | None,
    calls: Sequence[Call],
    anatomy: Anatomy,
    *,
    gradients: bool = False,
    probes: int = 4,
    seed: int = 0,
    weights: bool = False,
    tell: Progress | None = None,
    batch_statistics: bool = False,
    blocks: str | None = None,
    ranks: Ranks | None = None,
    known: Collection[str] = (),
    contexts: tuple[int, ...] = (),
    closing: int = 0,
    like: nn.Module | None = None,
) -> tuple[list[Row], list[str]]:
    """Run a reference on a model's calls and measure what `examine` measures, but for spectra.

    A row of the twin stands beside the model's of the same stack, layer, part and head, so that both must have the same
    stacks: what the survey found in the model is lent to a twin that is made of the same modules (see `lent.is_lent`),
    any other is surveyed by itself. It is left as it was. Cost: one forward for each call, one for that survey, and
    backwards as for the model where gradients are asked for.

    Args:
        twin: of `diagnosis.reinitialised`; None for no rows. Every process of a distributed model calls this, and
            there are rows only where all have a twin.
        calls: those of the model, labels included.
        anatomy: of the model.
        gradients: also go back through the twin.
        probes: random projections, where it returns no loss.
        seed: of the projections, as for the model.
        weights: also measure weights, and what heads write through W_O.
        tell: hears of every block.
        batch_statistics: as for the model.
        blocks: path of the list of blocks, as for the model.
        ranks: the processes that examine the model; by default this one alone.
        known: sentences that were said of the model, and are not repeated.
        contexts: those at which the model was read; a slope is not taken over them.
        closing: how many special tokens end every sequence.
        like: the model itself, where it is at hand.

    Returns:
        Rows with `source="initialisation"`, and sentences about what could not be had.
    """
    together = ranks or Ranks()
    if not all(together.gathered(twin is not None)) or twin is None:
        return [], []
    told = tell or (lambda what, share: None)

    def heard(what: str, share: float) -> None:
        told(f"at initialisation: {what}", share)

    try:
        with undisturbed(twin, batch_statistics=batch_statistics):
            lent = is_lent(anatomy, like, twin)
            own = anatomy
            if not lent:
                heard("finding the blocks", 0.0)
                own = anatomy_of(twin, calls, together, blocks=blocks)
                differs = _differs(own, anatomy)
                if differs:
                    return [], [f"no reference at initialisation: {differs}."]
            observers, backwards = _observers(twin, own, weights=weights), None
            if lent:
                observers = [Followed(own), *observers]
            if gradients:
                observers += gradient_observers(twin, own, several=len(calls) > 1 or together.several)
                first = together.before(sum(call.sequences for call in calls))
                backwards = Backwards(twin, probes=probes, seed=seed, first=first)
            plan = ContextPlan(contexts, calls, own, partial(_of_a_context, own), closing=closing)
            said = record(twin, calls, own, [*observers, *plan.observers], heard, together, backwards)
            by_context, how = plan.readings(twin, observers, heard)
            of_weights = weight_rows(twin, own, seed=seed) if weights else []
            said += [*how, *statistics_notes(twin, batch_statistics=batch_statistics)]
    except FullrankError as error:  # of a draw that does not run on this batch, which is no fault of the model's
        return [], [f"no reference at initialisation: {str(error).rstrip('.')}."]
    rows = [row for observer in together.merged(observers) for row in observer.rows()]
    rows += [*(row for reading in by_context for row in reading.rows), *of_weights]
    notes = [f"at initialisation: {sentence}" for sentence in said if sentence not in known]
    return [replace(row, source=_SOURCE) for row in rows], notes


def _observers(twin: nn.Module, anatomy: Anatomy, *, weights: bool) -> list[Observer]:
    summaries = Summaries()
    observers = _of_a_context(anatomy, summaries)
    if weights:
        observers.append(HeadObserver(twin, anatomy, summaries))
    return [*observers, FreedMemory()]


def _of_a_context(anatomy: Anatomy, summaries: Summaries | None = None) -> list[Observer]:
    causal = [stack.name for stack in anatomy.stacks if stack.causal]
    return [Finite(), StreamObserver(causal=causal), AttentionObserver(summaries)]


def _differs(own: Anatomy, anatomy: Anatomy) -> str:
    """What makes rows of two anatomies stand for different things; empty where nothing does."""
    mine, theirs = ([stack.name for stack in one.stacks] for one in (own, anatomy))
    if mine != theirs:
        return f"it has other stacks than the model ({', '.join(mine)} and not {', '.join(theirs)})"
    for stack, other in zip(own.stacks, anatomy.stacks, strict=True):
        for what, found, expected in _shapes(stack, other):
            if found != expected:
                return f"its {stack.name} has other {what} than the model's ({found} and not {expected})"
    return ""


def _shapes(stack: Stack, other: Stack) -> list[tuple[str, Any, Any]]:
    return [
        ("blocks", len(stack.paths), len(other.paths)),
        ("attention calls", stack.calls, other.calls),
        ("heads", stack.heads, other.heads),
        ("width", stack.width, other.width),
        ("masks", _masks(stack), _masks(other)),
        ("axes", stack.layout, other.layout),
    ]


def _masks(stack: Stack) -> str:
    return "causal" if stack.causal else "not causal"
