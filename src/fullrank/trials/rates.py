"""Every variant at its own best learning rate, found by short trainings of which the best are made longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fullrank.errors import TrialError
from fullrank.trials.course import Course

__all__ = ["RATES", "Rates", "best_rate"]

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FACTOR = 10**0.5

Try = Callable[[float, int], Course]
"""A training at a learning rate, of so many steps."""


@dataclass(frozen=True)
class Rates:
    """What the search found.

    Attributes:
        best: the rate whose training lost least; None where all diverged.
        widest: the largest rate that was tried and still trains; None where none does.
        courses: the longest training at each rate that was tried, by rate.
        edge: whether the best stands at an end of what was tried, so that a better one may lie beyond.
        widest_is_edge: whether the widest is the largest that was tried, so that larger ones may train too.
    """

    best: float | None
    widest: float | None
    courses: dict[float, Course]
    edge: bool = False
    widest_is_edge: bool = False

    @property
    def course(self) -> Course | None:
        """The training at the best rate, of all steps."""
        return None if self.best is None else self.courses[self.best]

    @property
    def note(self) -> str:
        """What is to be said of the search; empty where nothing is."""
        if self.best is None:
            return f"diverged at every rate from {min(self.courses):.2g} to {max(self.courses):.2g}"
        said = []
        if self.edge:
            end = "smallest" if self.best == min(self.courses) else "largest"
            said.append(f"the best rate {self.best:.2g} is the {end} tried: a better one may lie beyond")
        if self.widest_is_edge:
            said.append(f"trains at {self.widest:.2g}, the largest tried: larger ones may train too")
        return "; ".join(said)


def best_rate(
    attempt: Try,
    *,
    steps: int,
    rates: Sequence[float] = RATES,
    chance: float | None = None,
    widest: bool = True,
) -> Rates:
    """Search by successive halving, then how far up one can go.

    All rates are tried for a quarter of the steps, of more than six the better third for half of them, and the best
    two for all; where these diverge, smaller rates one by one. Where the best stands at an end of the grid, the grid
    is made longer by one rate beyond that end, once. Then rates above the best are tried for all steps, each next one
    as long as the one below it trains. About four full trainings for five rates; short ones favour large rates, so
    that a smaller one may be missed that is better in the end.

    Args:
        attempt: trains from the same start, with held-out sequences to be judged by.
        steps: of a whole training.
        rates: the grid, of different positive numbers.
        chance: loss of who knows nothing; see `Course.trains`.
        widest: whether to look how far up one can go; otherwise it is told of the whole trainings that there were.

    Returns:
        What was found.

    Raises:
        TrialError: for an empty grid, or rates that are not different positive numbers.
    """
    if not rates or len(set(rates)) != len(rates) or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise TrialError(f"rates={tuple(rates)!r}; expected different positive numbers.")
    courses: dict[float, Course] = {}

    def tried(rate: float, length: int) -> float:
        before = courses.get(rate)
        if before is None or (before.steps < length and before.diverged is None):
            courses[rate] = attempt(rate, length)
        return _loss(courses[rate])

    left = sorted(rates)
    for share, keep in ((4, max(2, math.ceil(len(left) / 3))), (2, 2)):
        if len(left) <= keep or steps < 8:
            continue
        lengths = {rate: tried(rate, max(1, steps // share)) for rate in left}
        left = sorted(sorted(left, key=lengths.__getitem__)[:keep])
    best = min(left, key=lambda rate: tried(rate, steps))
    for smaller in sorted((rate for rate in (*rates, min(rates) / _FACTOR) if rate < best), reverse=True):
        if math.isfinite(tried(best, steps)):
            break
        best = smaller
    for end, beyond in ((min(rates), best / _FACTOR), (max(rates), best * _FACTOR)):
        if best == end and math.isfinite(tried(best, steps)) and tried(beyond, steps) < tried(best, steps):
            best = beyond
            break
    finite = math.isfinite(tried(best, steps))
    if widest and finite:
        for rate in sorted(rate for rate in rates if rate > best):
            tried(rate, steps)
            if not courses[rate].trains(chance):
                break
        best = min((rate for rate in courses if courses[rate].steps >= steps), key=lambda rate: _loss(courses[rate]))
    training = [rate for rate, course in courses.items() if course.steps >= steps and course.trains(chance)]
    top = max(training, default=None)
    return Rates(
        best=best if finite else None,
        widest=top,
        courses=dict(sorted(courses.items())),
        edge=finite and len(courses) > 1 and best in (min(courses), max(courses)),
        widest_is_edge=top is not None and top == max(courses),
    )


def _loss(course: Course) -> float:
    return course.final if math.isfinite(course.final) else math.inf
