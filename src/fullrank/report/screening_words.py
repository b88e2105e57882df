"""What a screening says, in sentences and cells: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fullrank.report.wording import MISSING, number

if TYPE_CHECKING:
    from fullrank.report.screened import Screened
    from fullrank.report.screening import Screening

__all__ = ["MEANINGS", "Column", "change_words", "columns", "number_columns", "said"]

MEANINGS = {
    "restores": "its numbers came at least half of the way to where they should be",
    "does not restore": "its numbers came less than half of the way, or went away from there",
    "nothing to restore": "its numbers stood where they should be before",
    "no reference": "the failure's own number has no reference, so that nothing says where it should be",
    "shows only in training": "nothing changes before the first step",
    "could not be read": "it was applied, and its numbers were not there afterwards",
    "failed in training": "it was applied, and the training stopped with an error",
    "could not be applied": "the model is untouched",
}
_NUMBERS = 3  # of the failures, in columns of their own
_BY_CHANCE = 0.025  # of variants that do nothing: their 95 % interval lies below 0


def said(screening: Screening) -> str:
    """What came out: who surely loses less, or who restores what; and what that does not prove.

    Args:
        screening: any.

    Returns:
        Sentences.
    """
    return _trained(screening) if screening.ranked else _untrained(screening)


def _trained(screening: Screening) -> str:
    parts = [*_base(screening)]
    compared = [row for row in screening.candidates if row.loss is not None]
    if not compared:
        return " ".join([*parts, _none(screening, "trained")])
    better = screening.losing_less
    once = screening.seeds < 2
    if better:
        parts.extend(_better(screening, better, len(compared), once=once))
    elif once:
        one = "the one candidate does not surely lose" if len(compared) == 1 else "no candidate surely loses"
        parts.append(f"In this one training {one} less than the model as it is; --seeds 3 says whether it repeats.")
    elif len(compared) == 1:
        parts.append("The one candidate does not help: no smaller loss than its own was shown.")
    else:
        parts.append(f"None of the {len(compared)} candidates helps: no smaller loss than its own was shown.")
    return " ".join([*parts, *_left_out(screening, len(compared), "trained")])


def _base(screening: Screening) -> list[str]:
    """What became of the model as it is, where that is not well."""
    base, chance = screening.as_it_is, screening.about.get("chance")
    if base.loss is not None and math.isinf(base.loss):
        return ["The model as it is diverges at every learning rate tried."]
    if base.trained is not False:
        return []
    where = "get below its start" if chance is None else f"come away from chance of {number(float(chance))}"
    return [f"The model as it is does not {where}: it ends at {number(base.loss)}."]


def _better(screening: Screening, better: Sequence[Screened], count: int, *, once: bool) -> list[str]:
    """Who loses less, and how sure that is."""
    first = min(better, key=_loss)
    least = min(screening.candidates, key=_loss)
    words = "trains" if first.change is None else f"loses least, {change_words(first)}"
    ahead = ""
    if _loss(least) < _loss(first):
        unsure = "an interval that holds 0" if least.change and least.change.low is not None else "no interval"
        ahead = f"{least.variant} has the smallest loss, with {unsure}; of those that surely lose less "
    if once:
        name = f"{ahead}{first.variant}"
        of = "" if count == 1 or first.change is None else f" of {count} candidates"
        words = "trains" if first.change is None else f"loses least{of}, {change_words(first)}"
        if count == 1 and first.change is not None:
            words = f"loses less, {change_words(first)}"
        parts = [f"In this one training {name} {words}; --seeds 3 says whether it repeats."]
    elif count == 1:
        words = words.replace("loses least", "loses less")
        parts = [f"The one candidate is shown to help: {first.variant} {words}."]
    else:
        parts = [f"{len(better)} of {count} candidates {_verb(better)} help: {ahead}{first.variant} {words}."]
    close = [row.variant for row in better if row is not first and _overlap(row, first)]
    if close:
        words = "interval of {} overlaps" if len(close) == 1 else "intervals of {} overlap"
        parts.append(f"The {words.format(_listed(close))} its own.")
    tested = sum(row.change is not None and row.change.low is not None for row in screening.candidates)
    if not once and tested > 1:
        luck = number(_BY_CHANCE * tested)
        parts.append(
            f"If none of {tested} did anything, {luck} of them would be expected to be shown to help all the same."
        )
    if screening.as_it_is.trained is False and not any(row.trained for row in better):
        stays = "It stays" if len(better) == 1 else "They stay"
        where = "above the start" if screening.about.get("chance") is None else "at chance"
        parts.append(f"{stays} {where} all the same: what helps to learn takes more steps to show.")
    return parts


def _loss(row: Screened) -> float:
    return math.inf if row.loss is None else row.loss


def _overlap(one: Screened, other: Screened) -> bool:
    if one.change is None or other.change is None or one.change.low is None or other.change.high is None:
        return False
    return one.change.low <= other.change.high


def _untrained(screening: Screening) -> str:
    groups = screening.groups()
    restoring = groups.get("restores", ())
    judged = len(restoring) + len(groups.get("does not restore", ()))
    if not judged:
        parts = [_none(screening, "judged by its numbers")]
    elif restoring:
        names = _listed([row.variant for row in restoring])
        if judged == 1:
            parts = [f"The one candidate restores the profile: {names}."]
        else:
            verb = _verb(restoring, "restores", "restore")
            parts = [f"{len(restoring)} of {judged} candidates {verb} the profile: {names}."]
    else:
        none = "The one candidate does not restore" if judged == 1 else f"None of the {judged} candidates restores"
        parts = [f"{none} the profile."]
    parts.extend(_left_out(screening, judged, "judged by their numbers"))
    idle = [row.variant for row in restoring if row.idle]
    if idle:
        parts.append(f"With {_listed(idle)} the network does next to nothing, which restores every profile.")
    tail = "--steps 150 trains each and ranks by loss." if screening.candidates else ""
    parts.append("Nothing was trained, so that nothing is ranked" + (f"; {tail}" if tail else "."))
    return " ".join(parts)


def _none(screening: Screening, done: str) -> str:
    """That no candidate is left of which anything could be said."""
    count = len(screening.candidates)
    if not count:
        return "No candidate was tried."
    return f"The one candidate could not be {done}." if count == 1 else f"No candidate could be {done}."


def _left_out(screening: Screening, count: int, done: str) -> list[str]:
    """How many candidates stand beside the others, which are not counted as if they did not help."""
    left = len(screening.candidates) - count
    if not left or not count:
        return []
    return [f"{left} other{'' if left == 1 else 's'} could not be {done}."]


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


def number_columns(screening: Screening) -> list[Column]:
    """A column for each of the numbers that decide, the first of the gravest failure first.

    Args:
        screening: whose numbers are listed.

    Returns:
        At most three, or one where no failure is named.
    """
    first = next((row for row in screening.rows if row.restored), None)
    if first is None:
        return []
    own = [index for index, one in enumerate(first.restored) if one.failure][:_NUMBERS] or [0]
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
