"""What a predicted report says beside its rows: which theories speak, how well they fit, and answers to type in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fullrank.theory.answer import Answer

__all__ = ["LeftOut", "Prediction", "Standing"]


@dataclass(frozen=True)
class Standing:
    """A theory that speaks of the architecture.

    Attributes:
        key: of its paper's card.
        title: a few words.
        fit: how well its assumptions hold, in (0, 1], before any measurement.
        strained: those that hold in part, and to which degree.
    """

    key: str
    title: str
    fit: float
    strained: tuple[tuple[str, float], ...] = ()

    @property
    def visibly_strained(self) -> tuple[tuple[str, float], ...]:
        """Those whose degree is below 1 in the three digits that are shown."""
        return tuple((says, degree) for says, degree in self.strained if degree < 0.9995)


@dataclass(frozen=True)
class LeftOut:
    """A theory that says nothing of the architecture, and why."""

    key: str
    title: str
    because: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Which theories speak of an architecture, and what a user takes away.

    Attributes:
        architecture: its fields.
        sentence: the architecture in words.
        standings: theories that speak of it, best first.
        left_out: those that do not.
        answers: numbers to take away.
    """

    architecture: Mapping[str, Any] = field(default_factory=dict)
    sentence: str = ""
    standings: tuple[Standing, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    answers: tuple[Answer, ...] = ()

    @property
    def primary(self) -> str | None:
        """The theory whose assumptions hold best; None where none speaks."""
        return self.standings[0].key if self.standings else None

    def to_record(self) -> dict[str, Any]:
        """In JSON's own types."""
        return asdict(self)

    @classmethod
    def from_record(cls, content: Mapping[str, Any]) -> Prediction:
        """From what `to_record` gave."""
        return cls(
            architecture=dict(content["architecture"]),
            sentence=str(content["sentence"]),
            standings=tuple(
                Standing(**{**one, "strained": tuple((str(says), float(degree)) for says, degree in one["strained"])})
                for one in content["standings"]
            ),
            left_out=tuple(LeftOut(**{**one, "because": tuple(one["because"])}) for one in content["left_out"]),
            answers=tuple(Answer(**one) for one in content["answers"]),
        )
