"""One variant of a screening: applied, examined, trained, undone; and what is said where any of that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fullrank.errors import FullrankError
from fullrank.remedies import Asked, Repair
from fullrank.report import Report
from fullrank.report.screened import AS_IT_IS, LossChange, Screened
from fullrank.trials import Recommendation, Settings, Trial
from fullrank.verbs.passes import anatomy_of
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.restored import Number, compared, identity_distance_in, unread
from fullrank.verbs.screen_grounds import Bench, School

__all__ = ["Start", "recommended", "tried"]


@dataclass(frozen=True)
class Start:
    """The model as it is, against which every variant is held.

    Attributes:
        numbers: what is compared.
        report: of it.
        trained: how it trains; None without training.
    """

    numbers: Sequence[Number]
    report: Report
    trained: Trial | None

    @property
    def row(self) -> Screened:
        """Its line."""
        row = Screened(
            AS_IT_IS,
            kind=AS_IT_IS,
            restored=compared(self.numbers, self.report, self.report),
            identity_distance=identity_distance_in(self.report, self.numbers),
            extra_parameters=0,
        )
        return row if self.trained is None else _taught(row, self.trained, None)


def tried(
    bench: Bench, school: School | None, name: str, asked: Sequence[Asked], start: Start
) -> tuple[Screened, Report | None]:
    """One candidate. Whatever is raised on the way but an interrupt is its own failure, and the others go on.

    Args:
        bench: what it is examined on.
        school: what it is trained on; None without training.
        name: of the variant.
        asked: its remedies.
        start: the model as it is.

    Returns:
        Its line, and its report where it could be examined.
    """
    exactness = " + ".join(dict.fromkeys(one.remedy.exactness for one in asked))
    row = Screened(name, exactness=exactness, parameters="; ".join(map(str, asked)))
    try:
        repair = bench.repaired(asked)
    except Exception as reason:  # noqa: BLE001 - a model may raise anything; other candidates go on
        return replace(row, note=_sentence(reason), failed=True), None
    try:
        row = replace(row, extra_parameters=repair.parameters)
        row, profile = _examined(bench, row, start)
        return (row if school is None else _schooled(school, repair, row, start)), profile
    finally:
        repair.undo()


def _examined(bench: Bench, row: Screened, start: Start) -> tuple[Screened, Report | None]:
    try:
        after = bench.examined(bench.model, reference=False)
    except Exception as reason:  # noqa: BLE001
        return _stumbled(row, "reading", f"could not be examined: {_sentence(reason)}"), None
    found = replace(
        row,
        restored=compared(start.numbers, start.report, after),
        identity_distance=identity_distance_in(after, start.numbers),
        note=unread(start.numbers, start.report, after),
    )
    return found, after


def _schooled(school: School, repair: Repair, row: Screened, start: Start) -> Screened:
    try:
        return _taught(row, school.taught(repair), start.trained)
    except Exception as reason:  # noqa: BLE001
        return _stumbled(row, "training", f"failed in training: {_sentence(reason)}")


def recommended(bench: Bench, school: School, one: Recommendation, start: Start) -> Screened:
    """One plain change of the training.

    Args:
        bench: with the model.
        school: what it is trained on.
        one: which.
        start: the model as it is, trained.

    Returns:
        Its line.
    """
    assert start.trained is not None
    row = Screened(one.name, kind="recommendation", parameters=one.formula, extra_parameters=0)
    try:
        settings = one.applied_to(replace(Settings(), learning_rate=start.trained.rate))
        edit = one.edit(bench.model, anatomy_of(bench.model, list(bench.calls), Ranks()))
    except Exception as reason:  # noqa: BLE001
        return replace(row, note=_sentence(reason), failed=True)
    try:
        with edit:
            trained = school.taught(None, settings, settings.learning_rate if one.fixed_rate else None)
    except Exception as reason:  # noqa: BLE001
        return _stumbled(row, "training", f"failed in training: {_sentence(reason)}")
    return _taught(row, trained, start.trained)


def _taught(row: Screened, trained: Trial, base: Trial | None) -> Screened:
    """The line with what came out of its training."""
    found = None if base is None else trained.against(base)
    change = None if found is None else LossChange(found.mean, found.low, found.high, found.seeds, found.sequences)
    if found is not None and found.stderr is None:  # of one number
        change = LossChange(found.mean, None, None, found.seeds, found.sequences)
    searched = trained.rates
    return replace(
        row,
        loss=trained.loss,
        change=change,
        trained=trained.trained,
        learning_rate=trained.rate,
        widest_rate=None if searched is None else searched.widest,
        seconds_ratio=None if base is None else trained.seconds / base.seconds,
        note="; ".join(note for note in (row.note, "" if searched is None else searched.note) if note),
    )


def _stumbled(row: Screened, where: Literal["reading", "training"], note: str) -> Screened:
    return replace(row, stumbled=where, note="; ".join(part for part in (row.note, note) if part))


def _sentence(reason: Exception) -> str:
    """What a failure says, in one line; of a kind that is not the library's own with its type."""
    words = " ".join(str(reason).split())
    return words if isinstance(reason, FullrankError) else f"{type(reason).__name__}: {words}".rstrip(": ")
