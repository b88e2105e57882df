"""The table of false alarms: written from what was said of healthy models, and read again by the page on verdicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from fullrank.diagnosis import Threshold
    from healthy.examining import Outcome
    from healthy.sensitive import Reading

__all__ = ["Alarms", "Line", "alarms", "alarms_table", "families_table", "number", "read", "spoken_of"]

Side = Literal["lower", "higher"]
WORDS: Final = ("note", "warn", "fail")
HEADS: Final = (
    *("limit", "value", "held against", "notes", "warnings", "failures"),
    *("twice as sensitive", "notes", "warnings", "failures"),
)


@dataclass(frozen=True)
class Alarms:
    """Of how many models the gravest that is said is a note, a warning, a failure."""

    note: int
    warn: int
    fail: int

    @classmethod
    def of(cls, said: Iterable[str]) -> Alarms:
        """Counted."""
        counted = Counter(said)
        return cls(*(counted[word] for word in WORDS))

    @property
    def gravity(self) -> tuple[int, int, int]:
        """Failures, then warnings, then notes: what is compared."""
        return self.fail, self.warn, self.note

    @property
    def cells(self) -> tuple[str, str, str]:
        """Of a table; empty for none."""
        return tuple(str(count or "") for count in (self.note, self.warn, self.fail))  # type: ignore[return-value]


@dataclass(frozen=True)
class Line:
    """What is known of one threshold.

    Attributes:
        value: as it is written.
        held: examinations in which it was read.
        now: what was said there.
        moved: to which values, as they are written: where both sides say the same, both.
        then: what is said there.
    """

    value: str
    held: int
    now: Alarms
    moved: str
    then: Alarms


def number(value: float) -> str:
    """A limit as it stands in tables."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def alarms(threshold: Threshold, outcomes: Sequence[Outcome]) -> Line:
    """Count what was said of healthy models by the failures that read a threshold.

    Args:
        threshold: which.
        outcomes: of all models.

    Returns:
        Its line; the side to which it is moved is the one with the graver alarms.
    """
    from healthy.sensitive import SIDES, moved

    found: list[Reading] = [one.readings[threshold.name] for one in outcomes if threshold.name in one.readings]
    then: Mapping[Side, Alarms] = {side: Alarms.of(one.beside[side] for one in found) for side in SIDES}
    worst = max(SIDES, key=lambda side: then[side].gravity)
    equal = then["lower"].gravity == then["higher"].gravity
    values = [number(moved(threshold.value, side)) for side in SIDES if equal or side == worst]
    now = Alarms.of(one.at_its_value for one in found)
    return Line(number(threshold.value), len(found), now, " and ".join(values), then[worst])


def alarms_table(lines: Mapping[str, Line]) -> list[str]:
    """Lines of markdown, one a threshold."""
    rows = []
    for name, one in lines.items():
        then = (one.moved, *one.then.cells) if one.held else ("",) * 4
        rows.append((f"`{name}`", one.value, str(one.held), *one.now.cells, *then))
    return [f"| {' | '.join(row)} |" for row in (HEADS, ("---",) * len(HEADS), *rows)]


def read(text: str) -> dict[str, Line]:
    """The lines of `alarms_table`, from the text that holds them."""
    found = {}
    for name, rest in re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in rest.split("|")]
        if len(cells) == len(HEADS) - 1:
            value, held, *now = cells[:5]
            moved, *then = cells[5:]
            found[name] = Line(value, int(held), _counted(now), moved, _counted(then))
    return found


def _counted(cells: Sequence[str]) -> Alarms:
    return Alarms(*(int(cell or 0) for cell in cells))


def families_table(outcomes: Sequence[Outcome], kinds: Mapping[str, str]) -> list[str]:
    """Lines of markdown, one a kind of healthy model."""
    heads = ("healthy models", "examined", "not", "notes alone", "one warning", "more", "failures", "weights misjudged")
    rows = []
    for kind, words in kinds.items():
        of = [one for one in outcomes if one.kind == kind]
        seen = [one for one in of if not one.refused]
        worst = [Counter(severity for severity, _, _ in one.said) for one in seen]
        counts = (
            len(seen),
            len(of) - len(seen),
            sum(bool(one["note"]) and not one["warn"] and not one["fail"] for one in worst),
            sum(one["warn"] == 1 and not one["fail"] for one in worst),
            sum(one["warn"] > 1 and not one["fail"] for one in worst),
            sum(bool(one["fail"]) for one in worst),
            sum(one.misjudged for one in seen),
        )
        rows.append((words, *(str(count or "") for count in counts)))
    return [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)]


def spoken_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of markdown: every warning and failure; how often each note; what was not examined, and why."""
    graver = [
        f"- {one.name} ({one.kind}): {severity} {name}: {claim}"
        for one in outcomes
        for severity, name, claim in one.said
        if severity != "note"
    ]
    lines = ["Warned about:", "", *graver] if graver else ["None is warned about."]
    notes = Counter(name for one in outcomes for name in {name for severity, name, _ in one.said if severity == "note"})
    if notes:
        lines += ["", f"Notes: {', '.join(f'{name} in {count}' for name, count in notes.most_common())}."]
    refused = [f"- {one.name} ({one.kind}): {one.refused}" for one in outcomes if one.refused]
    return [*lines, *(["", "Not examined:", "", *refused] if refused else [])]
