"""Healthy models examined with everything on, and looked at again with every threshold moved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import fullrank
from fullrank.diagnosis import THRESHOLDS, Evidence
from fullrank.diagnosis.catalogue import FAILURES
from fullrank.diagnosis.freshness import freshness
from fullrank.report.verdict import Diagnosis
from fullrank.verbs import diagnosed
from healthy.models import TRAINED, Healthy
from healthy.sensitive import SIDES, Reading, Said, Side, moved, readings, recorded, set_to

__all__ = ["OPTIONS", "Outcome", "examined"]

OPTIONS: Final = {"gradients": True, "weights": True, "spectrum": False, "verify": True}


@dataclass(frozen=True)
class Outcome:
    """What was said of a healthy model.

    Attributes:
        kind: of `healthy.models.KINDS`.
        name: of the model.
        refused: why it was not examined; empty where it was.
        weights: trained or fresh, as the report says.
        said: severity, failure and claim of every verdict.
        readings: by threshold. Of those by which weights are judged a warning is a misjudgement, of those by which the
            reference is drawn one that is drawn another way.
        contexts: whether it was read at several.
        seconds: of examining, without looking again.
    """

    kind: str
    name: str
    refused: str = ""
    weights: str = ""
    said: tuple[tuple[str, str, str], ...] = ()
    readings: Mapping[str, Reading] = field(default_factory=dict)
    contexts: bool = False
    seconds: float = 0.0

    @property
    def misjudged(self) -> bool:
        """Whether trained weights were called fresh, or fresh ones trained."""
        return self.weights == ("fresh" if self.kind in TRAINED else "trained")


@dataclass
class _Kept:
    """What a function was called with the last time, which thresholds it read, and what it gave."""

    run: Callable[..., Any]
    args: tuple[Any, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    gave: Any = None

    def __call__(self, *args: Any, **known: Any) -> Any:
        self.args, self.known = args, known
        with recorded() as names:
            self.gave = self.run(*args, **known)
        self.read = frozenset(names)
        return self.gave

    def moved(self, judge: Callable[[Any], Said]) -> dict[str, Reading]:
        """What is judged of what it gives with the same arguments and each threshold that it reads moved."""
        found = {}
        for name in sorted(self.read):
            beside: dict[Side, Said] = {}
            for side in SIDES:
                with set_to(name, moved(THRESHOLDS[name].value, side)):
                    beside[side] = judge(self.run(*self.args, **self.known))
            found[name] = Reading(judge(self.gave), beside)
        return found


def examined(one: Healthy, cache: Path | None = None) -> Outcome:
    """Examine a healthy model and look at its evidence with every threshold moved to both sides.

    Args:
        one: the model.
        cache: a folder with weights of trained models.

    Returns:
        What was said.
    """
    patient = one.patient(cache)
    diagnose, judge, draw = _Kept(diagnosed.diagnose), _Kept(freshness), _Kept(diagnosed.reinitialised)
    started = time.perf_counter()
    with mock.patch.multiple(diagnosed, diagnose=diagnose, freshness=judge, reinitialised=draw):
        try:
            report = fullrank.examine(patient.model, patient.batch, **OPTIONS, **patient.options)
        except fullrank.FullrankError as error:
            return Outcome(one.kind, one.name, refused=str(error).splitlines()[0])
    seconds = time.perf_counter() - started
    found, (evidence, _) = report.diagnosis, diagnose.args
    assert isinstance(found, Diagnosis)
    assert isinstance(evidence, Evidence)
    of_reference = draw.moved(lambda made: "" if made.how == draw.gave.how else "warn")
    judge.known = dict(judge.known) | {"told": None}  # what the loader knows is believed, and nothing is compared
    judge(*judge.args, **judge.known)
    wrong = "fresh" if one.trained else "trained"
    compared = judge.args[1] is not None  # with a reference
    of_weights = judge.moved(lambda judged: "warn" if judged[0] == wrong else "") if compared else {}
    return Outcome(
        one.kind,
        one.name,
        weights=found.weights,
        said=tuple((str(verdict.severity), verdict.name, verdict.claim) for verdict in found.verdicts),
        readings=of_reference | of_weights | readings(evidence, FAILURES, diagnose.known["tester"]),
        contexts=bool(report.context_slopes),
        seconds=seconds,
    )
