"""What planted and clean cases have shown: counts, the confusion matrix, precision and recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from planted.cases import FAILURE_OF, FOLLOWS, Outcome

CLEAN = "clean"


@dataclass(frozen=True)
class Score:
    """Of one failure over the cases of a half.

    Attributes:
        failure: its name.
        planted: cases in which it was planted.
        named: of these, those in which it is named with a warning or a failure where it is.
        false: cases, planted with something else or with nothing, in which it is named though nothing entails it; or
            in which it is named at other layers than those where it is.
    """

    failure: str
    planted: int
    named: int
    false: int

    @property
    def recall(self) -> float:
        return self.named / self.planted if self.planted else 1.0

    @property
    def precision(self) -> float:
        said = self.named + self.false
        return self.named / said if said else 1.0


def scores(outcomes: Sequence[Outcome]) -> list[Score]:
    """One for each failure that is planted or said, in the order of planting; then all together."""
    names = list(dict.fromkeys(one for one in FAILURE_OF.values()))
    names += sorted({name for one in outcomes for name in one.false} - set(names))
    found = []
    for name in names:
        mine = [one for one in outcomes if one.case.failure == name]
        false = sum(name in one.false for one in outcomes)
        found.append(Score(name, len(mine), sum(one.right for one in mine), false))
    sums = (sum(getattr(one, of) for one in found) for of in ("planted", "named", "false"))
    return [*found, Score("all", *sums)]


def confusion(outcomes: Sequence[Outcome]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """How many cases of each fault have a warning or a failure of each name.

    Args:
        outcomes: of a half.

    Returns:
        Names of verdicts; fault → name → `cases`, `cases*` where the fault entails it.
    """
    faults = [*FAILURE_OF, CLEAN]
    counted: dict[str, Counter[str]] = {fault: Counter() for fault in faults}
    for one in outcomes:
        fault = one.case.fault if one.case.failure else CLEAN
        counted[fault].update({name for name, _, _ in one.said} or {"nothing"})
    names = list(dict.fromkeys(FAILURE_OF.values()))
    names += sorted({name for of in counted.values() for name in of} - {*names, "nothing"})
    shown = {
        fault: {
            name: f"{of[name]}{'*' if name in FOLLOWS.get(fault, ()) else ''}" if of[name] else ""
            for name in [*names, "nothing"]
        }
        for fault, of in counted.items()
    }
    return [*names, "nothing"], shown


def halves_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of markdown: scores, the confusion matrix, what was missed and what is false."""
    planted = [one for one in outcomes if one.case.failure]
    clean = [one for one in outcomes if not one.case.failure]
    warned = [one for one in clean if one.said]
    failed = [one for one in clean if any(severity == "fail" for _, severity, _ in one.said)]
    lines = [
        f"{len(planted)} planted cases, {sum(one.right for one in planted)} named where they are; {len(clean)} clean "
        f"cases, {sum(one.right for one in clean)} right: {len(failed)} with a failure, {len(warned)} with a warning "
        "or more.",
        "",
        "| failure | planted | named at its layers | recall | false | precision |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.failure} | {one.planted} | {one.named} | {one.recall:.2f} | {one.false} | {one.precision:.2f} |"
        for one in scores(outcomes)
    ]
    names, shown = confusion(outcomes)
    lines += ["", f"| planted | cases | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    cases = Counter(one.case.fault if one.case.failure else CLEAN for one in outcomes)
    lines += [f"| `{fault}` | {cases[fault]} | {' | '.join(of.values())} |" for fault, of in shown.items()]
    wrong = [one for one in outcomes if not one.right or one.false]
    if wrong:
        lines += ["", "Not as they should be:", ""]
        lines += [f"- {one.case.words}: {_said(one)}" for one in wrong]
    return lines


def _said(one: Outcome) -> str:
    if not one.said:
        notes = [name for name, severity, _ in one.verdicts if severity == "note" and name == one.case.failure]
        return f"nothing said{'; the failure is among the notes' if notes else ''}."
    named = (f"{severity} {name} at {', '.join(map(str, layers)) or 'all'}" for name, severity, layers in one.said)
    return f"{'; '.join(named)}{' (not where it is)' if one.case.failure and not one.right else ''}."
