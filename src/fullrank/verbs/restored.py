"""The numbers that a screening holds against each other: of a report, those that its failures are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from fullrank.report import Report
from fullrank.report.screened import Restored
from fullrank.table import Row, headline

__all__ = ["Number", "compared", "identity_distance_in", "numbers_of"]


@dataclass(frozen=True)
class Number:
    """One number of a stack.

    Attributes:
        metric: a name of the vocabulary.
        stack: of the model.
        site: of the table.
        part: of the table; None for whatever stands there.
        how: of the last layer, or the median of all layers and heads.
    """

    metric: str
    stack: str
    site: str
    part: str | None
    how: Literal["last", "median"]

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


_ALWAYS = (("similarity", "stream", "out", "last"), ("residual", "stream", "out", "last"))
_BY_FAILURE: Mapping[str, Sequence[tuple[str, str, str | None, Literal["last", "median"]]]] = {
    "rank-collapse-depth": [("centered_effective_rank", "stream", "out", "last")],
    "rank-collapse-width": [("contrast_gain", "attention", "self", "median")],
    "dead-depth": [("update_share", "stream", "out", "last"), ("neighbour_cosine", "stream", "out", "last")],
    "vanishing-or-exploding": [("rms", "stream", "out", "last"), ("gradient_gain", "gradient", "out", "median")],
    "numerics": [("max_abs", "stream", "out", "last"), ("max_logit", "attention", "self", "median")],
    "entropy-collapse": [("normalized_entropy", "attention", "self", "median")],
    "averaging-heads": [("selectivity", "attention", "self", "median")],
    "query-key-starvation": [("elasticity_ratio", "gradient", None, "median")],
    "redundant-heads": [("head_similarity", "weights", None, "median")],
    "context-dilution": [("normalized_entropy", "attention", "self", "median")],
    "sinks": [("sink_mass", "attention", "self", "median")],
    "at-the-floor": [("distinct_at_dtype", "stream", "out", "last")],
}


def numbers_of(report: Report, failures: Iterable[str]) -> tuple[Number, ...]:
    """What to hold against each other: likeness and residual of tokens always, and what the failures are about.

    Args:
        report: of the model as it is.
        failures: names of its verdicts.

    Returns:
        Numbers that the report has, of every stack with verdicts, or of the first with attention.
    """
    named = [verdict.stack for verdict in report.verdicts]
    stacks = [str(one["name"]) for one in report.about.get("stacks", ())]
    chosen = dict.fromkeys(named or stacks[:1])
    asked: list[tuple[str, str, str | None, Any]] = [*_ALWAYS]
    for failure in failures:
        asked.extend(_BY_FAILURE.get(failure, ()))
    found = (Number(metric, stack, *rest) for stack in chosen for metric, *rest in dict.fromkeys(asked))
    return tuple(number for number in found if number.of(report) is not None)


def compared(numbers: Sequence[Number], before: Report, after: Report) -> tuple[Restored, ...]:
    """Numbers before and after, with the model's own initialisation and the null.

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
        )
        for number in numbers
    )


def identity_distance_in(report: Report, numbers: Sequence[Number]) -> float | None:
    """How far the blocks are from handing on what they are given; the largest of the stacks that are looked at."""
    stacks = dict.fromkeys(number.stack for number in numbers)
    values = [Number("identity_distance", stack, "stream", "out", "last").of(report) for stack in stacks]
    known = [value for value in values if value is not None]
    return max(known) if known else None
