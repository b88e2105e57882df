"""Every threshold of every verdict, with its reason: there are no others in this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["THRESHOLDS", "Threshold", "threshold"]


@dataclass(frozen=True)
class Threshold:
    """A limit beyond which a number is held against a model.

    Attributes:
        name: `dead-depth.update_share`: the failure, then what is limited.
        value: the limit.
        unit: of the number, in words.
        reason: where the limit comes from.
    """

    name: str
    value: float
    unit: str
    reason: str


def threshold(name: str) -> float:
    """The value of a threshold."""
    return THRESHOLDS[name].value


_ALL: Final = (
    Threshold(
        "effect.loss",
        0.01,
        "nats of loss",
        "a hundredth of a nat is within the noise of the last steps of a run",
    ),
    Threshold("effect.distribution", 0.01, "nats of KL", "the same, of the output distribution"),
    Threshold(
        "effect.state",
        0.01,
        "share of the final state's variance",
        "a hundredth of the variance over tokens and documents: a probe on the state would lose as little",
    ),
)

THRESHOLDS: Final[dict[str, Threshold]] = {one.name: one for one in _ALL}
