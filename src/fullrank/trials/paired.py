"""Whether a variant loses less than the model as it is: differences of the same sequences under the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fullrank.diagnosis.sure import margin
from fullrank.errors import TrialError
from fullrank.table import Row

__all__ = ["Difference", "paired"]


@dataclass(frozen=True)
class Difference:
    """Mean loss of a variant minus that of the model as it is, in nats.

    Attributes:
        mean: over seeds and held-out sequences; below 0 where the variant loses less.
        low: lower end of the 95 % interval by Student's t; the mean where there was one number only.
        high: its upper end.
        seeds: how many trainings of each.
        sequences: held out, the same for all.
        stderr: standard error of the mean; None of one number.
    """

    mean: float
    low: float
    high: float
    seeds: int
    sequences: int
    stderr: float | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0, so that there is a difference at all."""
        return self.stderr is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.stderr is None:
            return f"{self.mean:+.3f}, of one number: no interval"
        said = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return said if self.shown else f"{said}: no difference shown"


def paired(variant: Sequence[Sequence[float]], as_it_is: Sequence[Sequence[float]]) -> Difference:
    """The difference in loss with its interval.

    d_si is the difference of sequence i under seed s. Two things vary, the luck of a training and which sequences were
    held out: se² = Var_s(d̄_s·)/S + Var_i(d̄_·i)/I, with Welch's and Satterthwaite's degrees of freedom, so that se is
    never smaller than the standard error of either alone. With one seed the first term is unknown and left out: the
    interval then holds for this one training, and another may end outside it.

    Args:
        variant: its loss of every held-out sequence, for each seed.
        as_it_is: of the same sequences under the same seeds.

    Returns:
        The difference.

    Raises:
        TrialError: for seeds or sequences that are not the same ones, or none.
    """
    sizes = {len(one) for one in (*variant, *as_it_is)}
    if not variant or len(variant) != len(as_it_is) or len(sizes) != 1 or 0 in sizes:
        raise TrialError("the losses to be paired are not of the same seeds and sequences, or there are none.")
    d = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(variant, as_it_is, strict=True)]
    S, sequences = len(d), len(d[0])
    of_seeds = [math.fsum(one) / sequences for one in d]
    of_sequences = [math.fsum(column) / S for column in zip(*d, strict=True)]
    mean = math.fsum(of_seeds) / S
    parts = [(_variance(values) / len(values), len(values) - 1) for values in (of_seeds, of_sequences)]
    known = [(square, freedom) for square, freedom in parts if freedom > 0]
    if not known or not math.isfinite(mean):
        return Difference(mean, mean, mean, S, sequences, None)
    stderr = math.sqrt(math.fsum(square for square, _ in known))
    spread = math.fsum(square**2 / freedom for square, freedom in known)
    freedom = stderr**4 / spread if spread else min(freedom for _, freedom in known)
    half = margin(Row("all", 0, "stream", "out", "loss", mean, stderr=stderr, n=1 + max(1, int(freedom + 1e-6))))
    return Difference(mean, mean - half, mean + half, S, sequences, stderr)


def _variance(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
