"""Per-sequence values, gathered place by place, that become one row with a mean and a standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from fullrank.table import Row

__all__ = ["Gathered", "Place", "Reduce", "Samples"]

Reduce = Literal["mean", "mode", "largest"]


class Place(NamedTuple):
    """Where a number was taken."""

    stack: str
    layer: int
    site: str
    part: str


class _Key(NamedTuple):
    place: Place
    metric: str
    scope: str


class Gathered(NamedTuple):
    """The values of one number.

    Attributes:
        place: where.
        metric: a name of the vocabulary.
        scope: what it was taken over.
        values: of each batch, (sequences,) or (sequences, heads).
        heads: which heads the columns are; None for all.
    """

    place: Place
    metric: str
    scope: str
    values: tuple[Tensor, ...]
    heads: tuple[int, ...] | None


@dataclass
class _Gathered:
    values: list[Tensor] = field(default_factory=list)
    exact: bool = True
    undefined: str = ""
    note: str = ""
    reduce: Reduce = "mean"
    heads: tuple[int, ...] | None = None


class Samples:
    """One value per sequence (and head) for each place, metric and scope.

    Values stay on their device until `rows` is called, so that gathering never waits for an accelerator.
    """

    def __init__(self) -> None:
        self._gathered: dict[_Key, _Gathered] = {}

    def add(
        self,
        place: Place,
        metric: str,
        values: Tensor,
        *,
        scope: str = "all",
        exact: bool = True,
        undefined: str = "undefined for these tokens",
        note: str = "",
        reduce: Reduce = "mean",
        heads: tuple[int, ...] | None = None,
    ) -> None:
        """Take in one batch.

        Args:
            place: where.
            metric: a name of the vocabulary.
            values: (sequences,) or (sequences, heads); NaN where the number is undefined.
            scope: what it was taken over.
            exact: False where it was sampled or capped; one inexact batch makes the row inexact.
            undefined: the reason given where no sequence has a defined value.
            note: what a reader should know where there is a value.
            reduce: `mean`; `mode` for positions, whose average means nothing; `largest` for what one sequence alone
                decides, as whether a dtype can hold the numbers. Neither of the last two has a standard error.
            heads: which heads the columns of `values` are, where they are not all of them.
        """
        entry = self._gathered.setdefault(_Key(place, metric, scope), _Gathered())
        entry.values.append(values.detach())
        entry.exact &= exact
        entry.undefined, entry.reduce, entry.heads = undefined, reduce, heads
        entry.note = note or entry.note

    def merge(self, other: Self) -> None:
        """Append the sequences that another gathered."""
        for key, theirs in other._gathered.items():
            for values in theirs.values:
                self.add(
                    key.place,
                    key.metric,
                    values,
                    scope=key.scope,
                    exact=theirs.exact,
                    undefined=theirs.undefined,
                    note=theirs.note,
                    reduce=theirs.reduce,
                    heads=theirs.heads,
                )

    def rows(self) -> list[Row]:
        """One row per place, metric, scope and head, in the order in which they were first seen."""
        return [row for key, entry in self._gathered.items() for row in _rows(key, entry)]

    def series(self) -> Iterator[Gathered]:
        """The values themselves, batch by batch, of every place, metric and scope whose row is their mean."""
        for key, entry in self._gathered.items():
            if entry.reduce == "mean":
                yield Gathered(*key, tuple(entry.values), entry.heads)


def _rows(key: _Key, entry: _Gathered) -> list[Row]:
    values = torch.cat([value.to("cpu", torch.float64) for value in entry.values])  # (sequences, [heads])
    if values.ndim == 1:
        return [_row(key, entry, values, None)]
    heads = range(values.shape[1]) if entry.heads is None else entry.heads
    return [_row(key, entry, column, head) for head, column in zip(heads, values.unbind(1), strict=True)]


def _row(key: _Key, entry: _Gathered, values: Tensor, head: int | None) -> Row:
    known = values[~values.isnan()]
    n = known.numel()
    value: float | None
    stderr: float | None = None
    if n == 0:
        value = None
    elif entry.reduce == "mode":
        value = float(known.mode().values)
    elif entry.reduce == "largest":
        value = float(known.max())
    else:
        value = float(known.mean())
        if n > 1 and math.isfinite(value):
            stderr = float(known.std()) / math.sqrt(n)
    return Row(
        stack=key.place.stack,
        layer=key.place.layer,
        site=key.place.site,
        part=key.place.part,
        metric=key.metric,
        value=value,
        head=head,
        scope=key.scope,
        stderr=stderr,
        n=n,
        exact=entry.exact,
        note=entry.undefined if value is None else entry.note,
    )
