"""What a row's number is surely not below and not above: the ends of its 95 % interval."""

from __future__ import annotations

import functools
import math

from fullrank.diagnosis.thresholds import threshold
from fullrank.table import Row

__all__ = ["above", "at_least", "at_most", "below", "margin"]


def margin(row: Row) -> float:
    """How far a value may be off: half of its interval by Student's t over its n sequences; 0 without an error."""
    return 0.0 if not row.stderr else _quantile(threshold("sure.level"), row.n) * row.stderr


@functools.cache
def _quantile(level: float, n: int | None) -> float:
    from scipy.stats import norm, t

    tail = (1 + level) / 2
    return float(norm.ppf(tail) if n is None or n < 2 else t.ppf(tail, n - 1))


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
