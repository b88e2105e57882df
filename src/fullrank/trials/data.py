"""What variants are trained and judged on: the same batches in the same order for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import TrialError
from fullrank.trials.objective import LossFunction, Objective, objective_for
from fullrank.trials.task import Task

__all__ = ["Data", "of_batches", "of_task"]


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
    """
    count = max(1, sequences // size)
    return Data(
        f"{task.name}: {task.sentence}",
        task.objective,
        lambda seed: list(task.batches(seed, steps, size)),
        tuple(task.batches(1, count, size, train=False)),
        tuple(task.batches(0, count, size, train=False)),
        task.chance,
    )


def of_batches(
    batches: Iterable[Any], *, loss: Objective | LossFunction | None = None, causal: bool = False, most: int = 10_000
) -> Data:
    """A user's batches: the last quarter held out, as many before them to choose on where there are enough.

    Every seed reads those for training in an order of its own, seed 0 in the one that they have.

    Args:
        batches: mappings, tuples or tensors.
        loss: an objective, or a function of model and batch; by default what the batches say.
        causal: whether batches without labels have a next token to be said.
        most: batches that are read of an endless iterable.

    Returns:
        The data.

    Raises:
        TrialError: for no batches, or batches without a loss.
    """
    if isinstance(batches, Mapping | Tensor | tuple | str):
        batches = [batches]
    found = [batch for _, batch in zip(range(most), batches, strict=False)]
    if not found:
        raise TrialError("data is empty: there is nothing to train on.")
    objective = objective_for(found[0], loss=loss, causal=causal)
    quarter = len(found) // 4 or len(found) // 2
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

    def training(seed: int) -> list[Any]:
        if not seed:
            return list(own)
        return [own[at] for at in torch.randperm(len(own), generator=torch.Generator().manual_seed(seed)).tolist()]

    return Data("your data", objective, training, tuple(choosing), tuple(held_out), None, notes)
