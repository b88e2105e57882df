"""The few numbers per layer that a report opens with, on the terminal, in a notebook and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.report.wording import at_floor, number
from fullrank.table import Row, headline

__all__ = ["Cell", "Column", "Headlines", "headlines"]

Reduced = Literal["value", "mean", "max", "min"]

_CHOICE: tuple[tuple[str, str, Reduced, bool], ...] = (
    # metric, heading, how heads are put together, whether the bar ends at 1
    ("token_energy", "token energy", "value", True),
    ("similarity", "similarity", "value", True),
    ("centered_stable_rank", "centred stable rank", "value", False),
    ("centered_effective_rank", "centred effective rank", "value", False),
    ("update_share", "update share", "value", False),
    ("normalized_entropy", "norm. entropy", "mean", True),
    ("sink_mass", "sink mass", "max", True),
    ("outlier_share", "outlier share", "mean", True),
)
_OF_GRADIENTS: tuple[tuple[str, str, Reduced, bool], ...] = (
    ("gradient_gain", "gradient gain", "value", False),
    ("gradient_rms", "gradient rms", "value", False),
    ("query_key_to_value_output", "qk/vo gradient", "value", False),
    ("elasticity_ratio", "qk/vo elasticity", "value", False),
)
_OF_WEIGHTS: tuple[tuple[str, str, Reduced, bool], ...] = (
    ("condensation", "condensation", "max", True),
    ("weight_stable_rank", "stable rank", "min", False),
    ("spectral_norm", "spectral norm", "max", False),
    ("qk_eigenvalue_variance", "qk variance", "mean", False),
    ("value_output_sign", "vo sign", "mean", False),
)
_INSTEAD = {"centered_effective_rank": "centered_stable_rank"}
"""Shown only where the other is not there."""
_OF_DIFFERENCES = ("token_energy", "similarity", "centered_stable_rank", "centered_effective_rank")
"""What is made of rounding where the residual stands at the float floor."""


@dataclass(frozen=True)
class Cell:
    """One number of the headline table.

    Attributes:
        text: the number, – where it could not be had, empty where it was not asked for.
        share: length of its bar in [0, 1]; None without a bar.
        floor: whether it stands at the float floor.
        said: why it is missing, or which head it is of.
    """

    text: str = ""
    share: float | None = None
    floor: bool = False
    said: str = ""


@dataclass(frozen=True)
class Column:
    """A headline metric: name, short heading, how heads or weights were put together, scope, whether bars end at 1.

    `several` names what was put together; `bars` is False for what is no number of the metric's own: ratios and kinds.
    """

    metric: str
    heading: str
    reduced: Reduced
    scope: str
    unit: bool
    several: str = "head"
    bars: bool = True

    @property
    def caption(self) -> str:
        """How the number came from several heads and over which tokens, where that is not obvious."""
        of = self.several
        heads = {"value": "", "mean": f"mean over {of}s", "max": f"largest {of}", "min": f"smallest {of}"}[self.reduced]
        return ", ".join(words for words in (heads, self.scope if self.scope != "all" else "") if words)


@dataclass(frozen=True)
class Headlines:
    """One table: a stack (and, beyond its first attention, that attention) with a line per layer."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[int, tuple[Cell, ...]], ...]

    def pairs(self, cells: tuple[Cell, ...]) -> list[tuple[Column, Cell]]:
        """A line's cells with their columns."""
        return list(zip(self.columns, cells, strict=True))

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes of its columns that are not the plain one."""
        return tuple(dict.fromkeys(column.scope for column in self.columns if column.scope != "all"))

    @property
    def has_floor(self) -> bool:
        """Whether any value is marked as standing at the float floor."""
        return any(cell.floor for _, cells in self.lines for cell in cells)


def headlines(rows: Iterable[Row]) -> tuple[Headlines, ...]:
    """The opening tables of one source's rows: one per stack, and one more for each further attention of its blocks."""
    rows = list(rows)
    tables = []
    for stack in dict.fromkeys(row.stack for row in rows):
        of_stack = [row for row in rows if row.stack == stack]
        stream = [row for row in of_stack if row.site == "stream" and row.part == "out" and row.head is None]
        attentions = list(dict.fromkeys(row.part for row in of_stack if row.site == "attention"))
        first = attentions[0] if attentions else None
        own = [row for row in of_stack if row.site == "attention" and row.part == first]
        tables.append(_table(stack, stream + own))
        for part in attentions[1:]:
            others = [row for row in of_stack if row.site == "attention" and row.part == part]
            tables.append(_table(f"{stack} · {part} attention", others))
        tables.append(_of_gradients(stack, of_stack, first))
        tables.append(_of_weights(stack, of_stack))
    return tuple(table for table in tables if table.columns)


def _of_gradients(stack: str, rows: Sequence[Row], attention: str | None) -> Headlines:
    """Of the stream at block outputs and of the blocks' first attention."""
    kept = [row for row in rows if row.site == "gradient" and row.part in ("out", attention) and row.head is None]
    return _table(f"{stack} · gradients", kept, _OF_GRADIENTS)


def _of_weights(stack: str, rows: Sequence[Row]) -> Headlines:
    """The most extreme of a layer's weights, and its heads' circuits; embeddings are no layer."""
    kept = [row for row in rows if row.site == "weights" and "embed" not in row.part]
    return _table(f"{stack} · weights", kept, _OF_WEIGHTS, several="weight")


def _table(
    title: str,
    rows: Sequence[Row],
    choice: Sequence[tuple[str, str, Reduced, bool]] = _CHOICE,
    *,
    several: str = "head",
) -> Headlines:
    have = {row.metric for row in rows}
    floor = frozenset(row.layer for row in rows if row.site == "stream" and at_floor(row))
    columns: list[Column] = []
    cells: list[dict[int, Cell]] = []
    for metric, heading, reduced, unit in choice:
        if metric not in have or _INSTEAD.get(metric) in have:
            continue
        of_metric = [row for row in rows if row.metric == metric]
        scope = headline({row.scope for row in of_metric})
        of_metric = [row for row in of_metric if row.scope == scope]
        heads = any(row.head is not None for row in of_metric)
        if heads:
            of_metric = [row for row in of_metric if row.head is not None]
        columns.append(Column(metric, heading, reduced, scope, unit, "head" if heads else several))
        cells.append(_cells(of_metric, reduced, floor if metric in _OF_DIFFERENCES else frozenset(), unit=unit))
    layers = sorted({layer for column in cells for layer in column})
    lines = tuple((layer, tuple(column.get(layer, Cell()) for column in cells)) for layer in layers)
    return Headlines(title, tuple(columns), lines)


def _cells(rows: Sequence[Row], reduced: Reduced, floor: frozenset[int], *, unit: bool) -> dict[int, Cell]:
    by_layer: dict[int, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(row)
    values: dict[int, float] = {}
    said: dict[int, str] = {}
    for layer, group in by_layer.items():
        known = [(row.value, _name(row)) for row in group if row.value is not None and math.isfinite(row.value)]
        infinite = [row.value for row in group if row.value is not None and math.isinf(row.value)]
        if infinite:
            values[layer] = infinite[0]
        elif known and reduced in ("max", "min"):
            most = max if reduced == "max" else min
            values[layer], said[layer] = most(known, key=lambda pair: pair[0])
        elif known:
            values[layer] = sum(value for value, _ in known) / len(known)
        missing = [row for row in group if row.value is None]
        if missing and known:
            said[layer] = f"{len(missing)} of {len(group)} left out: {missing[0].note}"
        elif missing:
            said[layer] = missing[0].note
    finite = [abs(value) for value in values.values() if math.isfinite(value)]
    end = 1.0 if unit else max(finite, default=1.0) or 1.0
    return {
        layer: Cell(
            number(values.get(layer)),
            _share(values.get(layer), end),
            layer in floor or any(at_floor(row) for row in group),
            said.get(layer, ""),
        )
        for layer, group in by_layer.items()
    }


def _name(row: Row) -> str:
    if row.head is not None:
        return f"head {row.head}"
    return row.part if row.site == "weights" else ""


def _share(value: float | None, end: float) -> float | None:
    if value is None:
        return None
    return 1.0 if math.isinf(value) else min(max(value / end, 0.0), 1.0)
