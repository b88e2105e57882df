"""How numbers change with the context, in words: the steepest changes that chance does not explain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fullrank.report.glossary import term
from fullrank.report.places import place_words
from fullrank.report.wording import number
from fullrank.table import Row, Slope, context_of, without_context

__all__ = ["Trend", "contexts_of", "counted", "interval", "steepest"]

_GIVEN = frozenset({"numerical_rank", "centered_numerical_rank"})
"""What rises with the number of tokens whatever the model does."""


@dataclass(frozen=True)
class Trend:
    """One significant slope in words.

    Attributes:
        slope: the numbers.
        where: `decoder layer 3 head 5`.
        said: `rises by 0.12 nat per doubling, 95 % interval 0.10 to 0.14`.
    """

    slope: Slope
    where: str
    said: str


def contexts_of(rows: Iterable[Row]) -> list[int]:
    """The contexts that rows were taken at, rising."""
    return sorted({context for row in rows if (context := context_of(row.scope)) is not None})


def interval(slope: Slope) -> str:
    """The 95 % interval of the change per doubling, or why there is none."""
    if slope.low is None or slope.high is None:
        return slope.note or "no interval"
    return f"95 % interval {number(slope.low)} to {number(slope.high)}"


def steepest(slopes: Sequence[Slope], rows: Iterable[Row], *, most: int = 12, each: int = 2) -> list[Trend]:
    """The steepest slopes whose interval leaves out 0.

    Steep is what changes by a large share of the number's own size per doubling, so that metrics of different units can
    stand in one list.

    Args:
        slopes: of a report.
        rows: of the same report, for the sizes.
        most: how many at most.
        each: how many of one metric: its neighbours would say one thing over and over.

    Returns:
        Trends, steepest first.
    """
    sizes: dict[tuple[object, ...], float] = {}
    for row in rows:
        scope, context = without_context(row.scope)
        if context is not None and row.value is not None and math.isfinite(row.value):
            key = (*row.key[1:6], scope, row.metric)
            sizes[key] = max(sizes.get(key, 0.0), abs(row.value))
    ranked = []
    for slope in slopes:
        size = sizes.get((slope.stack, slope.layer, slope.site, slope.part, slope.head, slope.scope, slope.metric), 0.0)
        plain = slope.metric not in _GIVEN and "no-" not in slope.scope
        if plain and slope.significant and slope.per_doubling and size > 0:
            ranked.append((abs(slope.per_doubling) / size, slope))
    ranked.sort(key=lambda pair: -pair[0])
    taken: dict[str, int] = {}
    found: list[Trend] = []
    for _, slope in ranked:
        taken[slope.metric] = taken.get(slope.metric, 0) + 1
        if taken[slope.metric] <= each and len(found) < most:
            found.append(Trend(slope, _where(slope), _said(slope)))
    return found


def counted(slopes: Sequence[Slope]) -> str:
    """How many intervals leave out 0, and how many would by chance."""
    known = [slope for slope in slopes if slope.low is not None]
    if not known:
        return "No intervals: they need at least two sequences."
    clear = sum(slope.significant for slope in known)
    chance = round(0.05 * len(known))
    return f"{clear:,} of {len(known):,} intervals leave out 0; about {chance:,} would if nothing changed."


def _where(slope: Slope) -> str:
    where = f"{slope.stack} layer {slope.layer}"
    if slope.site == "attention":
        where += f" {slope.part} attention" if slope.part != "self" else ""
    elif (slope.site, slope.part) != ("stream", "out"):
        where += f", {place_words(slope.site, slope.part)}"
    return where + (f" head {slope.head}" if slope.head is not None else "")


def _said(slope: Slope) -> str:
    change = slope.per_doubling or 0.0
    unit = term(slope.metric).unit
    shown = number(abs(change)) + (f" {unit}" if unit and len(unit) <= 6 and unit not in ("1", "none") else "")
    said = f"{'rises' if change > 0 else 'falls'} by {shown} per doubling, {interval(slope)}"
    if slope.exponent is not None:
        said += f"; like context^{slope.exponent:.2f}".replace("-", "−")
    return said
