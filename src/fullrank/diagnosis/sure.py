"""What a row's number is surely not below and not above: its value and a few standard errors to either side."""

from __future__ import annotations

import math

from fullrank.diagnosis.thresholds import threshold
from fullrank.table import Row

__all__ = ["above", "at_least", "at_most", "below", "margin"]


def margin(row: Row) -> float:
    """How far a value may be off: `sure.errors` standard errors, 0 where it has none."""
    return threshold("sure.errors") * (row.stderr or 0.0)


def at_least(row: Row) -> float:
    """The lower end: the value less its margin; NaN without a value."""
    return _value(row) - margin(row)


def at_most(row: Row) -> float:
    """The upper end: the value and its margin; NaN without a value."""
    return _value(row) + margin(row)


def above(row: Row, limit: float) -> bool:
    """Whether a value surely exceeds a limit."""
    return at_least(row) > limit


def below(row: Row, limit: float) -> bool:
    """Whether a value surely lies under a limit."""
    return at_most(row) < limit


def _value(row: Row) -> float:
    return float(row.value) if row.value is not None else math.nan
