"""What a screening says, in sentences: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fullrank.report.screening_columns import change_words
from fullrank.report.wording import number

if TYPE_CHECKING:
    from fullrank.report.screened import Screened
    from fullrank.report.screening import Screening

__all__ = ["MEANINGS", "said"]

MEANINGS = {
    "restores": "its numbers came at least half of the way to where they should be, for every failure that is named",
    "restores in part": "its numbers did so for some of the failures that are named, and not for others",
    "does not restore": "its numbers came less than half of the way, or went away from there",
    "nothing to restore": "its numbers stood where they should be before",
    "no reference": "the failure's own number has no reference, so that nothing says where it should be",
    "shows only in training": "nothing changes before the first step",
    "could not be read": "it was applied, and its numbers were not there afterwards",
    "failed in training": "it was applied, and the training stopped with an error",
    "could not be applied": "the model is untouched",
}
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
    what = _compared(screening)
    partly = groups.get("restores in part", ())
    judged = len(restoring) + len(partly) + len(groups.get("does not restore", ()))
    if not judged:
        parts = [_none(screening, "judged by its numbers")]
    elif restoring:
        names = _listed([row.variant for row in restoring])
        if judged == 1:
            parts = [f"The one candidate restores {what}: {names}."]
        else:
            verb = _verb(restoring, "restores", "restore")
            parts = [f"{len(restoring)} of {judged} candidates {verb} {what}: {names}."]
    else:
        none = "The one candidate does not restore" if judged == 1 else f"None of the {judged} candidates restores"
        parts = [f"{none} {what}."]
    parts.extend(_in_part(partly))
    parts.extend(_left_out(screening, judged, "judged by their numbers"))
    leaving = [row.variant for row in restoring if row.leaves]
    if leaving:
        other = next(one for row in restoring if row.leaves for one in row.restored if one not in row.deciding)
        parts.append(f"With {_listed(leaving)} {other.metric} stays away from where it should be.")
    idle = [row.variant for row in screening.candidates if row.idle and _somewhere(row)]
    if idle:
        parts.append(f"With {_listed(idle)} the network does next to nothing, which restores every profile.")
    tail = "--steps 150 trains each and ranks by loss." if screening.candidates else ""
    parts.append("Nothing was trained, so that nothing is ranked" + (f"; {tail}" if tail else "."))
    return " ".join(parts)


def _in_part(rows: Sequence[Screened]) -> list[str]:
    """Which failures are undone and which are not, of those candidates that undo the same together."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for row in rows:
        left = tuple(name for name in row.shares if name not in row.restored_failures)
        alike.setdefault((row.restored_failures, left), []).append(row.variant)
    return [
        f"In part {_listed(names)} {'does' if len(names) == 1 else 'do'}: for {_listed(done)}, not for {_listed(left)}."
        for (done, left), names in alike.items()
    ]


def _compared(screening: Screening) -> str:
    """What is restored or not: the failures' own numbers by name, or the profile where no failure is named."""
    first = next((row for row in screening.rows if row.restored), None)
    own = [one.metric for one in first.deciding if one.failure] if first is not None else []
    return _listed(list(dict.fromkeys(own))) if own else "the profile"


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


def _somewhere(row: Screened) -> bool:
    """Whether any of its numbers came most of the way."""
    return any(one.share is not None and one.share >= 0.5 for one in row.restored)
