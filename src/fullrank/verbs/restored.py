"""The numbers that a screening holds against each other: of a report, those that its failures are about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from fullrank.metrics import VOCABULARY
from fullrank.report import Report
from fullrank.report.screened import Healthy, Restored, Scale
from fullrank.table import Row, headline

__all__ = ["Number", "compared", "identity_distance_in", "numbers_of", "unread"]


@dataclass(frozen=True)
class Number:
    """One number of a stack.

    Attributes:
        metric: a name of the vocabulary.
        stack: of the model.
        site: of the table.
        part: of the table; None for whatever stands there.
        how: of the last layer, or the median of all layers and heads.
        failure: whose own number it is; empty for what is compared besides.
    """

    metric: str
    stack: str
    site: str
    part: str | None
    how: Literal["last", "median"]
    failure: str = ""

    @property
    def place(self) -> str:
        """Where it is read, in words."""
        return f"{self.stack}, {'last layer' if self.how == 'last' else 'median over layers'}"

    def of(self, report: Report | None) -> float | None:
        """Its value in a report; None where it is not there or not known."""
        rows = [] if report is None else self._rows(report)
        if not rows:
            return None
        last = max(row.layer for row in rows)
        values = [row.value for row in rows if self.how == "median" or row.layer == last]
        known = [value for value in values if value is not None]
        return median(known) if known else None

    def _rows(self, report: Report) -> list[Row]:
        asked = {"metric": self.metric, "stack": self.stack, "site": self.site}
        rows = [row for row in report.rows.where(**asked).rows if self.part in (None, row.part) and row.layer > 0]
        scopes = {row.scope for row in rows}
        return [row for row in rows if row.scope == headline(scopes)] if rows else []


@dataclass(frozen=True)
class _Scale:
    """How a metric is read: which side is healthy, whether ratios count, and its healthy end where there is one."""

    healthy: Healthy
    scale: Scale = "linear"
    end: float | None = None

    def tolerance(self, metric: str) -> float:
        """A difference that is none: of ratios 5 %, of bounded metrics .02 of their range."""
        low, high = VOCABULARY[metric].range
        return _RATIO if self.scale == "log" else _SHARE * (high - low if math.isfinite(high - low) else 1.0)


_RATIO = math.log(1.05)
_SHARE = 0.02
_SCALES: Mapping[str, _Scale] = {  # what the vocabulary says of each metric's ends, as numbers
    "similarity": _Scale("low", end=0.0),
    "residual": _Scale("high", end=1.0),
    "centered_effective_rank": _Scale("high", "log"),
    "contrast_gain": _Scale("high", end=1.0),
    "update_share": _Scale("high", "log"),
    "neighbour_cosine": _Scale("low"),
    "rms": _Scale("both", "log", 1.0),
    "gradient_gain": _Scale("both", "log", 1.0),
    "max_abs": _Scale("both", "log"),
    "max_logit": _Scale("both", "log"),
    "normalized_entropy": _Scale("both"),
    "selectivity": _Scale("high"),
    "elasticity_ratio": _Scale("high", "log", 1.0),
    "head_similarity": _Scale("low", end=0.0),
    "sink_mass": _Scale("low"),
    "distinct_at_dtype": _Scale("high", end=1.0),
}

_Where = tuple[str, str, str | None, Literal["last", "median"]]
_ALWAYS: Sequence[_Where] = (("similarity", "stream", "out", "last"), ("residual", "stream", "out", "last"))
_BY_FAILURE: Mapping[str, Sequence[_Where]] = {
    "rank-collapse-depth": [*_ALWAYS, ("centered_effective_rank", "stream", "out", "last")],
    "rank-collapse-width": [("contrast_gain", "attention", "self", "median")],
    "dead-depth": [("update_share", "stream", "out", "last"), ("neighbour_cosine", "stream", "out", "last")],
    "vanishing-or-exploding": [("rms", "stream", "out", "last"), ("gradient_gain", "gradient", "out", "median")],
    "numerics": [("max_abs", "stream", "out", "last"), ("max_logit", "attention", "self", "median")],
    "entropy-collapse": [("normalized_entropy", "attention", "self", "median")],
    "averaging-heads": [("selectivity", "attention", "self", "median")],
    "query-key-starvation": [("elasticity_ratio", "gradient", None, "median")],
    "redundant-heads": [("head_similarity", "attention", None, "median")],
    "context-dilution": [("normalized_entropy", "attention", "self", "median")],
    "sinks": [("sink_mass", "attention", "self", "median")],
    "at-the-floor": [("distinct_at_dtype", "stream", "out", "last"), ("residual", "stream", "out", "last")],
}


def numbers_of(report: Report) -> tuple[Number, ...]:
    """What to hold against each other: the failures' own numbers, the gravest first, then likeness and residual.

    Args:
        report: of the model as it is, with its verdicts.

    Returns:
        Numbers that the report has, of the stacks of verdicts, or of the first with attention; of a failure of whose
        own numbers it has none, the first of them all the same, so that nobody overlooks it.
    """
    verdicts = sorted(report.verdicts, key=lambda one: -one.severity.rank)
    found: dict[tuple[str, str, str], Number] = {}
    for verdict in verdicts:
        own = [
            Number(metric, verdict.stack, site, part, how, verdict.name)
            for metric, site, part, how in _BY_FAILURE.get(verdict.name, ())
        ]
        for number in [one for one in own if one.of(report) is not None] or own[:1]:
            found.setdefault((number.metric, number.stack, number.site), number)
    stacks = [str(one["name"]) for one in report.about.get("stacks", ())]
    for stack in dict.fromkeys([one.stack for one in verdicts] or stacks[:1]):
        for metric, site, part, how in _ALWAYS:
            number = Number(metric, stack, site, part, how)
            if number.of(report) is not None:
                found.setdefault((metric, stack, number.site), number)
    return tuple(found.values())


def compared(numbers: Sequence[Number], before: Report, after: Report | None) -> tuple[Restored, ...]:
    """Numbers before and after, with the model's own initialisation, the null and the healthy end.

    Fresh weights are their own initialisation, to which nothing needs to come back: they are held against the null.

    Args:
        numbers: which.
        before: of the model as it is, with its reference where one was drawn.
        after: of a variant.

    Returns:
        In the same order.
    """
    nulls: Mapping[str, Mapping[str, float]] = before.about.get("nulls", {})
    fresh = before.diagnosis is not None and before.diagnosis.weights == "fresh"
    reference = None if fresh else before.reference
    return tuple(
        Restored(
            metric=number.metric,
            place=number.place,
            before=number.of(before),
            after=number.of(after),
            reference=number.of(reference),
            null=nulls.get(number.stack, {}).get(number.metric) if number.site == "stream" else None,
            end=_SCALES[number.metric].end,
            healthy=_SCALES[number.metric].healthy,
            scale=_SCALES[number.metric].scale,
            tolerance=_SCALES[number.metric].tolerance(number.metric),
            failure=number.failure,
        )
        for number in numbers
    )


def unread(numbers: Sequence[Number], before: Report, after: Report) -> str:
    """Why numbers that the model as it is has are not there of a variant, in what its report says; empty where all are.

    Args:
        numbers: which.
        before: of the model as it is.
        after: of the variant.

    Returns:
        Its notes that the model as it is has not, or what is not there.
    """
    lost = [one for one in numbers if one.of(before) is not None and one.of(after) is None]
    if not lost:
        return ""
    said = [note for note in after.about.get("notes", ()) if note not in before.about.get("notes", ())]
    return " ".join(said) or f"{lost[0].metric} of {lost[0].place} could not be read."


def identity_distance_in(report: Report, numbers: Sequence[Number]) -> float | None:
    """How far the blocks are from handing on what they are given; the largest of the stacks that are looked at."""
    stacks = dict.fromkeys(number.stack for number in numbers)
    values = [Number("identity_distance", stack, "stream", "out", "last").of(report) for stack in stacks]
    known = [value for value in values if value is not None]
    return max(known) if known else None
