"""What a screening says, in sentences and cells: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fullrank.report.wording import MISSING, number

if TYPE_CHECKING:
    from fullrank.report.screened import Screened
    from fullrank.report.screening import Screening

__all__ = ["MEANINGS", "Column", "change_words", "columns", "said"]

MEANINGS = {
    "restores": "its numbers came at least half of the way to where they should be",
    "does not restore": "its numbers came less than half of the way, or went away from there",
    "shows only in training": "nothing changes before the first step",
    "could not be applied": "the model is untouched",
}


def said(screening: Screening) -> str:
    """What came out: who surely loses less, or who restores what; and what that does not prove.

    Args:
        screening: any.

    Returns:
        Sentences.
    """
    return _trained(screening) if screening.ranked else _untrained(screening)


def _trained(screening: Screening) -> str:
    count = len(screening.candidates)
    base = screening.as_it_is
    chance = screening.about.get("chance")
    parts = []
    if base.loss is not None and math.isinf(base.loss):
        parts.append("The model as it is diverges at every learning rate tried.")
    elif base.trained is False:
        at = f" of {number(float(chance))}" if chance is not None else ""
        parts.append(f"The model as it is does not come away from chance{at}: it ends at {number(base.loss)}.")
    helping = screening.helping
    if not helping:
        return " ".join([*parts, f"None of the {_candidates(count)} helps: no smaller loss than its own was shown."])
    first = min(helping, key=lambda row: math.inf if row.loss is None else row.loss)
    words = "trains" if first.change is None else f"loses least, {change_words(first)}"
    parts.append(f"{len(helping)} of {_candidates(count)} {_verb(helping)} help: {first.variant} {words}.")
    close = [row.variant for row in helping if row is not first and _overlap(row, first)]
    if close:
        words = "interval of {} overlaps" if len(close) == 1 else "intervals of {} overlap"
        parts.append(f"The {words.format(_listed(close))} its own.")
    if base.trained is False and not any(row.trained for row in helping):
        stays = "It stays" if len(helping) == 1 else "They stay"
        parts.append(f"{stays} at chance all the same: what helps to learn takes more steps to show.")
    return " ".join(parts)


def _overlap(one: Screened, other: Screened) -> bool:
    if one.change is None or other.change is None or one.change.low is None or other.change.high is None:
        return False
    return one.change.low <= other.change.high


def _untrained(screening: Screening) -> str:
    groups = screening.groups()
    count = len(screening.candidates)
    restoring = groups.get("restores", ())
    if not restoring:
        parts = [f"None of the {_candidates(count)} restores the profile."]
    else:
        names = _listed([row.variant for row in restoring])
        verb = _verb(restoring, "restores", "restore")
        parts = [f"{len(restoring)} of {_candidates(count)} {verb} the profile: {names}."]
    idle = [row.variant for row in restoring if row.idle]
    if idle:
        parts.append(f"With {_listed(idle)} the network does next to nothing, which restores every profile.")
    parts.append("Nothing was trained, so that nothing is ranked; --steps 150 trains each and ranks by loss.")
    return " ".join(parts)


def _candidates(count: int) -> str:
    return "1 candidate" if count == 1 else f"{count} candidates"


def _verb(rows: Sequence[Screened], one: str = "is shown to", many: str = "are shown to") -> str:
    return one if len(rows) == 1 else many


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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


def restored_words(row: Screened) -> str:
    """The first number before and after: `0.990 → 0.310`."""
    if not row.restored:
        return MISSING
    first = row.restored[0]
    return f"{number(first.before)} → {number(first.after)}"


def count_words(count: int | None) -> str:
    """`+1,024`, or 0."""
    return MISSING if count is None else f"+{count:,}" if count else "0"


def ratio_words(ratio: float | None) -> str:
    """`1.12×`."""
    return MISSING if ratio is None or math.isnan(ratio) else f"{ratio:.2f}×"
