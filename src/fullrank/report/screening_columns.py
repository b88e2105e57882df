"""The columns of a screening's table and what stands in its cells: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fullrank.report.wording import MISSING, number

if TYPE_CHECKING:
    from fullrank.report.screened import Screened
    from fullrank.report.screening import Screening

__all__ = ["Column", "change_words", "columns", "number_columns"]

_NUMBERS = 3  # of the failures, in columns of their own


class Column(NamedTuple):
    """A column of the table of variants.

    Attributes:
        name: for templates.
        heading: as it is read.
        words: of a variant.
        width: characters.
        right: whether numbers stand in it.
    """

    name: str
    heading: str
    words: Callable[[Screened], str]
    width: int
    right: bool = True


def columns(screening: Screening) -> list[Column]:
    """Those in which something stands, the most important first.

    Args:
        screening: whose variants are listed.

    Returns:
        The columns; the variant's name and rank are beside them.
    """
    trained = [
        Column("loss", "loss", loss_words, 8),
        Column("change", "against as it is, 95 %", change_words, 24),
    ]
    seen = [
        Column("distance", "from identity", lambda row: number(row.identity_distance), 8),
        Column("restored", "before → after", restored_words, 15, right=False),
    ]
    rates = [
        Column("rate", "best rate", lambda row: rate_words(row.learning_rate), 7),
        Column("widest", "widest rate", lambda row: rate_words(row.widest_rate), 7),
    ]
    costs = [
        Column("added", "added numbers", lambda row: count_words(row.extra_parameters), 8),
        Column("seconds", "time of a step", lambda row: ratio_words(row.seconds_ratio), 7),
    ]
    kind = Column("exactness", "exactness", lambda row: row.exactness or row.kind, 16, right=False)
    found = [*trained, *seen, *rates, kind, *costs] if screening.ranked else [*seen[::-1], kind, *costs]
    return [one for one in found if any(one.words(row) != MISSING for row in screening.rows)]


def number_columns(screening: Screening) -> list[Column]:
    """A column for each of the failures' own numbers, the gravest first.

    Args:
        screening: whose numbers are listed.

    Returns:
        At most three, and the first of those that are compared besides.
    """
    first = next((row for row in screening.rows if row.restored), None)
    if first is None:
        return []
    own = [index for index, one in enumerate(first.restored) if one.failure][:_NUMBERS]
    besides = [index for index, one in enumerate(first.restored) if not one.failure][:1]
    own += besides
    return [
        Column(
            f"restored {index}",
            f"{first.restored[index].metric.replace('_', ' ')} before → after",
            _at(index),
            15,
            False,
        )
        for index in own
    ]


def _at(index: int) -> Callable[[Screened], str]:
    return lambda row: restored_words(row, index)


def signed(value: float) -> str:
    """A difference with its sign."""
    return number(value) if value < 0 else f"+{number(value)}"


def change_words(row: Screened) -> str:
    """`−0.812 [−0.900, −0.724]`, with what to think of it where the interval holds 0."""
    if row.change is None:
        return MISSING
    if row.change.low is None or row.change.high is None:
        return f"{signed(row.change.mean)}, no interval"
    return f"{signed(row.change.mean)} [{signed(row.change.low)}, {signed(row.change.high)}]"


def loss_words(row: Screened) -> str:
    """The loss, or that it diverged."""
    if row.loss is None:
        return MISSING
    return "diverged" if math.isinf(row.loss) else number(row.loss)


def rate_words(rate: float | None) -> str:
    """A learning rate with two digits."""
    return MISSING if rate is None else f"{rate:.1e}".replace("e-0", "e−").replace("e-", "e−").replace(".0e", "e")


def restored_words(row: Screened, index: int = 0) -> str:
    """A number before and after: `0.990 → 0.310`."""
    if len(row.restored) <= index:
        return MISSING
    one = row.restored[index]
    return f"{number(one.before)} → {number(one.after)}"


def count_words(count: int | None) -> str:
    """`+1,024`, or 0."""
    return MISSING if count is None else f"+{count:,}" if count else "0"


def ratio_words(ratio: float | None) -> str:
    """`1.12×`."""
    return MISSING if ratio is None or math.isnan(ratio) else f"{ratio:.2f}×"
