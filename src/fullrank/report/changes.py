"""What changed most between two reports: one line per metric, at the layer where it changed most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullrank.report.means import by_layer
from fullrank.report.series import select
from fullrank.report.wording import number
from fullrank.table import Row

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["Change", "largest_changes"]

_ERRORS = 2.0
"""A change smaller than this many standard errors is not told apart from none."""
_LEAST = 0.02
"""Nor is one that is a smaller share of the metric's scale worth a line."""


@dataclass(frozen=True)
class Change:
    """A metric at one place and layer, before and after.

    Attributes:
        metric: its name.
        place: stack and, where it is not the block output, site or part.
        layer: where it changed most.
        scope: of the numbers.
        before: mean over heads where heads have it.
        after: the same, later.
        share: |after − before| over the metric's scale (1 for shares and probabilities, else the larger of the two).
    """

    metric: str
    place: str
    layer: int
    scope: str
    before: float
    after: float
    share: float

    @property
    def words(self) -> str:
        """`0.92 → 0.31`."""
        return f"{number(self.before)} → {number(self.after)}"


def largest_changes(before: Report, after: Report, *, most: int = 8) -> list[Change]:
    """The metrics that changed most, each at the layer where it did, in falling order of the share of their scale.

    Read are block outputs and attention, at the headline scope. A change below two standard errors of the difference,
    or below two hundredths of the scale, is left out.

    Args:
        before: one report.
        after: the other.
        most: how many.

    Returns:
        At most that many changes.
    """
    found: dict[tuple[str, str], Change] = {}
    for key in dict.fromkeys((row.metric, row.stack, row.site, row.part) for row in before.rows):
        metric, stack, site, part = key
        if site not in ("stream", "attention") or part == "mid" or metric.endswith("_position"):
            continue
        chosen = [_of(report, *key) for report in (before, after)]
        if not all(chosen) or chosen[0][0].scope != chosen[1][0].scope:
            continue
        first, last = (by_layer(rows) for rows in chosen)
        unit = _is_share(metric)
        for layer in first.keys() & last.keys():
            (a, error_a), (b, error_b) = first[layer], last[layer]
            scale = 1.0 if unit else max(abs(a), abs(b))
            share = abs(b - a) / scale if scale else 0.0
            noise = math.hypot(error_a or 0.0, error_b or 0.0)
            if share < _LEAST or abs(b - a) < _ERRORS * noise:
                continue
            place = stack if part in ("out", "self") else f"{stack} · {part}"
            change = Change(metric, place, layer, chosen[0][0].scope, a, b, share)
            known = found.get((metric, place))
            if known is None or (share, layer) > (known.share, known.layer):
                found[metric, place] = change
    return sorted(found.values(), key=lambda change: -change.share)[:most]


def _of(report: Report, metric: str, stack: str, site: str, part: str) -> list[Row]:
    rows = [row for row in report.rows if (row.metric, row.stack, row.site, row.part) == (metric, stack, site, part)]
    return select(rows, metric) if rows else []


def _is_share(metric: str) -> bool:
    from fullrank.metrics import VOCABULARY

    definition = VOCABULARY.get(metric)
    return definition is not None and definition.range[1] == 1 and definition.range[0] in (-1, 0)
