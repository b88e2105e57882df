"""Sums of squares from several backwards, and what is made of them: values, standard errors, reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "Squares", "estimate"]


class Estimate(NamedTuple):
    """A mean, its standard error (None where there is none to be had) and how many sequences entered."""

    value: float | None
    stderr: float | None
    n: int


class Squares:
    """Squared norms per sequence (and head), batch by batch and backward by backward.

    Stay on their device until they are asked for.
    """

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []

    def add(self, values: Tensor, backward: int) -> None:
        """Take in one backward: its first one (0) begins a batch."""
        if backward == 0 or not self.batches:
            self.batches.append([])
        self.batches[-1].append(values)

    def stacked(self) -> list[Tensor]:
        """(probes, sequences, [heads]) of each batch, in float64 on the CPU."""
        return [torch.stack([one.to("cpu", torch.float64) for one in batch]) for batch in self.batches]

    def merge(self, other: Squares) -> None:
        """Append the batches that another took in."""
        self.batches.extend(other.batches)


def estimate(function: Callable[..., Tensor], *squares: Sequence[Tensor]) -> list[Estimate]:
    """A function of mean squares: its mean over sequences, with a standard error over sequences or over probes.

    Per sequence the squares are averaged over probes first. The standard error is over sequences where there are
    several, else over probes (jackknife: each left out in turn).

    Args:
        function: of as many tensors (sequences, [heads]) as there are `squares`; NaN where undefined.
        squares: for each of its arguments the batches, (probes, sequences, [heads]).

    Returns:
        One estimate per head; one in all where there are no heads.
    """
    batches = list(zip(*squares, strict=True))
    values = torch.cat([function(*(S.mean(0) for S in batch)) for batch in batches])
    columns = values.unsqueeze(-1) if values.ndim == 1 else values
    spread = None
    if len(values) == 1 and len(batches) == 1:
        spread = _jackknife(function, batches[0])
    found = []
    for head, column in enumerate(columns.unbind(-1)):
        known = column[~column.isnan()]
        n = known.numel()
        value = float(known.mean()) if n else None
        stderr = None
        if n > 1 and value is not None and math.isfinite(value):
            stderr = float(known.std()) / math.sqrt(n)
        elif n == 1 and spread is not None:
            stderr = float(spread.reshape(-1)[head])
        found.append(Estimate(value, None if stderr is None or math.isnan(stderr) else stderr, n))
    return found


def _jackknife(function: Callable[..., Tensor], squares: Sequence[Tensor]) -> Tensor | None:
    probes = squares[0].shape[0]
    if probes < 2:
        return None
    totals = [S.sum(0) for S in squares]
    without = [
        function(*((total - S[p]) / (probes - 1) for total, S in zip(totals, squares, strict=True)))
        for p in range(probes)
    ]
    left = torch.stack(without)
    return ((left - left.mean(0)).square().sum(0) * (probes - 1) / probes).sqrt()
