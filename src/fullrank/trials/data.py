"""What variants are trained and judged on: the same batches in the same order for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import TrialError
from fullrank.trials.objective import Example, LossFunction, Objective, objective_for
from fullrank.trials.sequences import cut, have_targets, sequences_in
from fullrank.trials.task import Task

__all__ = ["Data", "of_batches", "of_task"]

JUDGED = 256  # sequences: the error of their mean is a sixteenth of what one of them varies by


@dataclass(frozen=True)
class Data:
    """Batches to train on, to choose a learning rate on, and to judge on.

    Attributes:
        name: what they are, in few words.
        objective: where the loss comes from.
        training: the batches of a seed.
        choosing: judged while learning rates are searched.
        held_out: judged at the end; what is compared.
        chance: loss of who knows nothing of the input; None where that is not known.
        notes: sentences for the reader of a comparison.
    """

    name: str
    objective: Objective
    training: Callable[[int], list[Any]]
    choosing: tuple[Any, ...]
    held_out: tuple[Any, ...]
    chance: float | None = None
    notes: tuple[str, ...] = ()


def of_task(task: Task, *, steps: int, size: int = 16, sequences: int = 64) -> Data:
    """Batches of a built-in task.

    Args:
        task: which.
        steps: as many batches to train on for each seed, no sequence twice but by chance.
        size: sequences in a batch.
        sequences: held out; as many others are there to choose learning rates on.

    Returns:
        The data.

    Raises:
        TrialError: for a number below 1.
    """
    for name, value in (("steps", steps), ("size", size), ("sequences", sequences)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TrialError(f"{name}={value!r}; the built-in task needs a whole number of at least 1.")
    small = min(size, sequences)
    count = sequences // small
    return Data(
        f"{task.name}: {task.sentence}",
        task.objective,
        lambda seed: list(task.batches(seed, steps, size)),
        tuple(task.batches(1, count, small, part="choosing")),
        tuple(task.batches(0, count, small, part="held out")),
        task.chance,
    )


def of_batches(
    batches: Iterable[Any],
    *,
    loss: Objective | LossFunction | None = None,
    causal: bool = False,
    most: int = 10_000,
    steps: int | None = None,
    seeds: int = 1,
) -> Data:
    """A user's batches: the last quarter held out, as many before them to choose on where there are enough.

    Not more than 256 sequences are held out, nor are more there to choose on: they are read after every training.
    With `steps` no more batches are read than are used, and the quarter is of those. Every seed reads those for
    training in an order of its own, seed 0 in the one that they have.

    Args:
        batches: mappings, tuples, lists or tensors.
        loss: an objective, or a function of model and batch; by default what the batches say.
        causal: whether batches without labels have a next token to be said.
        most: batches that are read of an endless iterable.
        steps: of each training; None where that is not known.
        seeds: how many trainings of a model there will be.

    Returns:
        The data.

    Raises:
        TrialError: for no batches, batches without a loss, or no target in what is held out.
    """
    if isinstance(batches, Mapping | Tensor | tuple | str):
        batches = [batches]
    found = _read(batches, most, None if steps is None else steps * seeds)
    if not found:
        raise TrialError("data is empty: there is nothing to train on.")
    objective = objective_for(found[0], loss=loss, causal=causal)
    quarter = min(len(found) // 4 or len(found) // 2, _enough(found[0]))
    notes: tuple[str, ...] = ()
    if len(found) == 1:
        own, choosing, held_out = found, found, found
        notes = ("there is one batch, so that losses are of the sequences that were trained on.",)
    elif len(found) < 4:
        own, held_out = found[:-1], found[-1:]
        choosing = held_out
        notes = ("there are few batches, so that learning rates were chosen on the sequences that are compared.",)
    else:
        own, choosing, held_out = found[: -2 * quarter], found[-2 * quarter : -quarter], found[-quarter:]
    choosing, held_out = (_capped([one for one in part if objective.judges(one)]) for part in (choosing, held_out))
    if not choosing or not held_out:
        raise TrialError(
            "no held-out sequence has a target: their labels are all -100, or they are single tokens; give more data."
        )

    unsure = sum(int((~have_targets(one)).sum()) for one in held_out if not isinstance(one, Example))
    if unsure:
        notes += (f"{unsure} held-out sequences may have no target, and are left out where they give no loss.",)

    def training(seed: int) -> list[Any]:
        if not seed:
            return list(own)
        return [own[at] for at in torch.randperm(len(own), generator=torch.Generator().manual_seed(seed)).tolist()]

    return Data("your data", objective, training, tuple(choosing), tuple(held_out), None, notes)


def _read(batches: Iterable[Any], most: int, trained: int | None) -> list[Any]:
    """Batches up to as many as are trained on, chosen on and held out, and none beyond."""
    found: list[Any] = []
    for batch in batches:
        found.append(batch)
        if len(found) >= most or (trained is not None and len(found) >= trained + 2 * _enough(found[0])):
            break
    return found


def _enough(batch: Any) -> int:
    """How many batches like this one hold the sequences that are judged."""
    return -(-JUDGED // max(1, sequences_in(batch)))


def _capped(batches: list[Any]) -> list[Any]:
    kept: list[Any] = []
    left = JUDGED
    for batch in batches:
        if left < 1:
            break
        kept.append(batch if isinstance(batch, Example) else cut(batch, left))
        left -= sequences_in(kept[-1])
    return kept
