"""One variant's trial: its best learning rate, then a training for every seed at that rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import Tensor, nn

from fullrank.errors import TrialError
from fullrank.trials.course import Course, Settings
from fullrank.trials.data import Data
from fullrank.trials.paired import Difference, paired
from fullrank.trials.rates import RATES, Rates, best_rate
from fullrank.trials.training import judged, train

__all__ = ["Trial", "trial"]


@dataclass(frozen=True)
class Trial:
    """How a variant trains.

    Attributes:
        rate: that it was trained at.
        courses: of every seed, at that rate.
        rates: the search; None where the rate was given.
        chance: of the data.
    """

    rate: float
    courses: tuple[Course, ...]
    rates: Rates | None
    chance: float | None

    @property
    def loss(self) -> float:
        """Mean of the held-out sequences over all seeds; infinite where a training diverged."""
        return math.fsum(course.final for course in self.courses) / len(self.courses)

    @property
    def trained(self) -> bool:
        """Whether every seed's training got somewhere; see `Course.trains`."""
        return all(course.trains(self.chance) for course in self.courses)

    @property
    def seconds(self) -> float:
        """Median of a step."""
        return median(course.seconds for course in self.courses)

    def against(self, as_it_is: Trial) -> Difference | None:
        """The paired difference in loss; None where either diverged under some seed."""
        if any(course.diverged is not None for course in (*self.courses, *as_it_is.courses)):
            return None
        return paired([c.held_out for c in self.courses], [c.held_out for c in as_it_is.courses])


def trial(
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    settings: Settings | None = None,
    rates: Sequence[float] = RATES,
    rate: float | None = None,
    widest: bool = True,
    extra_loss: Callable[[], Tensor] | None = None,
) -> Trial:
    """Try a model as it stands: with whatever edits are in force on it. It is given back as it came.

    The search reads the first seed's batches and chooses by the sequences for choosing; nothing is chosen by those that
    are compared later. Costs about four trainings, and one for every further seed. Every sequence is judged once before
    all of them and after each of those that it is for.

    Args:
        model: see `lent`.
        data: what on.
        steps: of each training.
        seeds: of the order of batches and of dropout.
        settings: all but the learning rate.
        rates: the grid.
        rate: a learning rate instead of a search.
        widest: whether to look how large a rate still trains.
        extra_loss: a penalty, added to what is differentiated.

    Returns:
        The trial.

    Raises:
        TrialError: where there is no seed, or nothing can be trained.
    """
    if not seeds:
        raise TrialError("seeds is empty; at least one is needed.")
    base = settings or Settings()
    started = {
        name: judged(model, batches, loss=data.objective)
        for name, batches in (("choosing", () if rate is not None else data.choosing), ("held out", data.held_out))
    }
    batches: dict[int, list[Any]] = {}
    whole: dict[float, Course] = {}

    def attempt(at: float, length: int, seed: int, judges: Sequence[Any], before: tuple[float, ...]) -> Course:
        if seed not in batches:
            batches.clear()  # of one seed at a time
            batches[seed] = data.training(seed)
        return train(
            model,
            batches[seed],
            steps=length,
            **replace(base, learning_rate=at, warm_up=base.steps_of_warm_up(steps)).as_arguments(),
            seed=seed,
            loss=data.objective,
            extra_loss=extra_loss,
            held_out=judges,
            started=before,
        )

    def searched(at: float, length: int) -> Course:
        first = started["choosing"]
        if length < steps:
            return attempt(at, length, seeds[0], data.choosing, first)
        # what may turn out to be the best is judged for the comparison too, and not trained again for it
        both = (*data.choosing, *data.held_out)
        course = attempt(at, length, seeds[0], both, first + started["held out"])
        whole[at] = replace(course, held_out=course.held_out[len(first) :], started=started["held out"])
        return replace(course, held_out=course.held_out[: len(first)], started=first)

    found = None
    if rate is None:
        found = best_rate(searched, steps=steps, rates=rates, chance=data.chance, widest=widest)
        rate = found.best if found.best is not None else min(rates)

    def final(seed: int) -> Course:
        known = whole.get(rate) if seed == seeds[0] else None
        return known or attempt(rate, steps, seed, data.held_out, started["held out"])

    return Trial(rate, tuple(final(seed) for seed in seeds), found, data.chance)
