"""Thresholds moved to twice as sensitive: what verdicts then say of the same evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from unittest import mock

from fullrank.diagnosis import THRESHOLDS, Evidence, Threshold, diagnose, thresholds
from fullrank.diagnosis.diagnose import Tester
from fullrank.diagnosis.failure import Failure
from fullrank.report.verdict import Severity

__all__ = ["SIDES", "Reading", "Said", "Side", "gravest", "moved", "readings", "recorded", "set_to"]

Side = Literal["lower", "higher"]
Said = Literal["", "note", "warn", "fail"]
SIDES: Final[tuple[Side, ...]] = ("lower", "higher")


@dataclass(frozen=True)
class Reading:
    """What one threshold has to do with what is said of one model.

    Attributes:
        at_its_value: gravest word of the failures that read it; empty where they say nothing.
        beside: the same with the threshold moved, on each side.
    """

    at_its_value: Said
    beside: Mapping[Side, Said]


def moved(value: float, side: Side) -> float:
    """A limit moved by a factor of two: of what it is, or of what it leaves to 1 where it is a share above one half.

    Args:
        value: the limit.
        side: to which.

    Returns:
        .98 becomes .96 or .99, .05 becomes .025 or .1, -.5 becomes -1 or -.25.
    """
    if 0.5 < value < 1:
        return 1 - (1 - value) * (2.0 if side == "lower" else 0.5)
    return value * (0.5 if (side == "lower") == (value > 0) else 2.0)


class _Recording(dict[str, Threshold]):
    """Thresholds that write down which of them are read."""

    def __init__(self, of: Mapping[str, Threshold]) -> None:
        super().__init__(of)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Threshold:
        self.read.add(name)
        return super().__getitem__(name)

    def items(self) -> Any:  # effect_limits
        self.read |= {name for name in self if name.startswith("effect.")}
        return super().items()


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Names of the thresholds that are read inside."""
    recording = _Recording(thresholds.THRESHOLDS)
    with mock.patch.object(thresholds, "THRESHOLDS", recording):
        yield recording.read


@contextmanager
def set_to(name: str, value: float) -> Iterator[None]:
    """One threshold at another value."""
    with mock.patch.dict(thresholds.THRESHOLDS, {name: replace(THRESHOLDS[name], value=value)}):
        yield


@dataclass
class _Looking:
    """One model's evidence, to be looked at again and again."""

    evidence: Evidence
    failures: Sequence[Failure]
    tester: Tester | None
    said: dict[tuple[str, str, float], Said] = field(default_factory=dict)

    def __call__(self, failure: Failure, name: str = "", value: float = 0.0) -> Said:
        """The gravest word of a failure; with a threshold at another value."""
        key = (failure.name, name, value)
        if key not in self.said:
            evidence = replace(self.evidence)  # what it keeps of earlier looks was found with other limits
            if name:
                with set_to(name, value):
                    found = diagnose(evidence, [failure], tester=self.tester)
            else:
                found = diagnose(evidence, [failure], tester=self.tester)
            self.said[key] = gravest(verdict.severity for verdict in found.verdicts)
        return self.said[key]


def readings(evidence: Evidence, failures: Sequence[Failure], tester: Tester | None) -> dict[str, Reading]:
    """Every threshold that is read when a model is looked at, and what is said where it is moved.

    A threshold that no failure reads at the values of all of them cannot change what is said of the model: it is not
    in the result.

    Args:
        evidence: of the model.
        failures: to look for.
        tester: of the same model, for suspicions that moved limits raise.

    Returns:
        By name.
    """
    look = _Looking(evidence, failures, tester)
    readers: dict[str, list[Failure]] = {}
    for failure in failures:
        with recorded() as names:
            look(failure)
        for name in names:
            readers.setdefault(name, []).append(failure)
    return {name: _reading(name, of, look) for name, of in sorted(readers.items())}


def _reading(name: str, failures: Sequence[Failure], look: Callable[..., Said]) -> Reading:
    value = THRESHOLDS[name].value
    beside = {side: gravest(look(one, name, moved(value, side)) for one in failures) for side in SIDES}
    return Reading(gravest(look(one) for one in failures), beside)


def gravest(words: Any) -> Said:
    """The gravest of severities; empty of none."""
    found = [Severity(word) for word in words if word]
    return str(max(found, key=lambda one: one.rank)) if found else ""  # type: ignore[return-value]
