"""Gradients within a time budget: last of all, of what there is time for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fullrank.capture import Anatomy
from fullrank.capture.events import Observer
from fullrank.measure.budget import Budget
from fullrank.verbs.batches import Call
from fullrank.verbs.gradients import Backwards, gradient_observers
from fullrank.verbs.passes import Progress, record

__all__ = ["backwards_within"]

_BACK = 2  # forwards that a backward takes


def backwards_within(
    budget: Budget,
    model: nn.Module,
    calls: Sequence[Call],
    anatomy: Anatomy,
    tell: Progress,
    *,
    forward: float,
    probes: int,
    seed: int,
) -> tuple[list[Observer], list[str], str]:
    """Go back through everything that was read if there is time for it, else through its first part, with one probe.

    Args:
        budget: what is left of it counts.
        model: in the state it is to be looked at.
        calls: what was read, in the parts in which it was; the first is one sequence where the batch could be divided.
        anatomy: what the survey found.
        tell: hears of every block.
        forward: seconds of one sequence's forward.
        probes: how many random projections were asked for, where the model has no loss.
        seed: of the projections.

    Returns:
        The observers of gradients, notes, and what was differentiated.
    """
    sequences = sum(call.sequences for call in calls)
    enough = budget.left >= forward * (1 + _BACK * probes) * sequences
    chosen = list(calls) if enough else [calls[0]]
    backwards = Backwards(model, probes=probes if enough else 1, seed=seed)
    observers = gradient_observers(model, anatomy, several=len(chosen) > 1)
    notes = record(model, chosen, anatomy, observers, tell, None, backwards)
    if not enough:
        through = "" if backwards.about.of == "loss" else ", through one random projection"
        count = chosen[0].sequences
        of = "1 sequence" if count == 1 else f"{count} sequences"
        notes.append(f"time budget of {budget.seconds:g} s: gradients of {of} only{through}.")
    return observers, notes, str(backwards.about)
