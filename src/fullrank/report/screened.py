"""One variant of a screening: what it changed, what that restored, and how it trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, Literal

__all__ = ["AS_IT_IS", "GROUPS", "Group", "Kind", "LossChange", "Restored", "Screened"]

Kind = Literal["as it is", "remedy", "recommendation"]
Group = Literal["as it is", "restores", "does not restore", "shows only in training", "could not be applied"]

AS_IT_IS: Literal["as it is"] = "as it is"
GROUPS: tuple[Group, ...] = (AS_IT_IS, "restores", "does not restore", "shows only in training", "could not be applied")

_HALF = 0.5  # of the way from what it was to where it should be
_ALIKE = 0.02  # of the larger of the two: the model stands where its reference does
_IDLE = 0.05  # of a block's input: what its blocks add, less being doing nothing


@dataclass(frozen=True)
class Restored:
    """One number before and after.

    Attributes:
        metric: a name of the vocabulary.
        place: where it was read, in words, such as `decoder, layer 24`.
        before: of the model as it is.
        after: with the variant in force; None where it could not be read.
        reference: of the same architecture at its own initialisation; None where none was drawn.
        null: of tokens that have nothing in common; None where that is not known.
    """

    metric: str
    place: str
    before: float | None
    after: float | None
    reference: float | None = None
    null: float | None = None

    @property
    def target(self) -> float | None:
        """Where it should be: the reference, or the null where there is none or the model stands there already."""
        if self.before is None or self.reference is None:
            return self.null
        alike = abs(self.before - self.reference) <= _ALIKE * max(abs(self.before), abs(self.reference))
        return self.null if alike else self.reference

    @property
    def share(self) -> float | None:
        """How much of the way from `before` to `target` it came: 1 all of it, 0 none, below 0 further away.

        Between the target and the null is no further away: tokens that differ more than at initialisation are no worse.
        None where there is no way to go, or nothing to compare with.
        """
        target = self.target
        if self.before is None or self.after is None or target is None or math.isnan(self.after):
            return None
        ends = sorted((target, target if self.null is None else self.null))
        way, left = (max(ends[0] - value, 0.0, value - ends[1]) for value in (self.before, self.after))
        return None if way <= _ALIKE * max(abs(self.before), abs(target)) else 1 - left / way


@dataclass(frozen=True)
class LossChange:
    """Mean loss of the variant minus that of the model as it is, in nats, over the same sequences and seeds.

    Attributes:
        mean: below 0 where the variant loses less.
        low: lower end of the 95 % interval; None of one number.
        high: its upper end.
        seeds: trainings of each.
        sequences: held out.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    sequences: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Screened:
    """A variant.

    Attributes:
        variant: its name, different from all others.
        kind: `as it is`, `remedy` or `recommendation`.
        exactness: `identity-now`, `init-only`, `changes-function`; empty where it is no remedy.
        parameters: what it was applied with, in words.
        restored: numbers before and after.
        identity_distance: how far the network is from doing nothing, 0 where every block returns its input; None where
            that was not read.
        loss: mean over held-out sequences and seeds after training; infinite where it diverged; None without training.
        change: the paired difference in loss; None without training, of the model as it is, and where it diverged.
        trained: whether it came away from chance; None without training.
        learning_rate: the best one.
        widest_rate: the largest that trains.
        extra_parameters: numbers to be trained that were added.
        seconds_ratio: time of a step over that of the model as it is.
        note: what to know, such as why it could not be applied or trained.
        failed: whether it could not be applied.
    """

    variant: str
    kind: Kind = "remedy"
    exactness: str = ""
    parameters: str = ""
    restored: tuple[Restored, ...] = ()
    identity_distance: float | None = None
    loss: float | None = None
    change: LossChange | None = None
    trained: bool | None = None
    learning_rate: float | None = None
    widest_rate: float | None = None
    extra_parameters: int | None = None
    seconds_ratio: float | None = None
    note: str = ""
    failed: bool = False

    @property
    def share(self) -> float | None:
        """Median share of the way that its numbers came; None where there is none to come."""
        shares = [share for one in self.restored if (share := one.share) is not None]
        return median(shares) if shares else None

    @property
    def idle(self) -> bool:
        """Whether the network does next to nothing, so that what it restores proves nothing."""
        return self.identity_distance is not None and self.identity_distance < _IDLE

    @property
    def group(self) -> Group:
        """Where it stands in a screening without training."""
        if self.failed:
            return "could not be applied"
        if self.kind == AS_IT_IS:
            return AS_IT_IS
        if not self.restored or all(one.after == one.before for one in self.restored):
            return "shows only in training"
        return "restores" if self.share is not None and self.share >= _HALF else "does not restore"

    def to_record(self) -> dict[str, Any]:
        """In dicts, lists and plain values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Screened:
        """What `to_record` gave."""
        given = {one.name: record[one.name] for one in fields(cls) if one.name in record}
        given["restored"] = tuple(Restored(**one) for one in record.get("restored") or ())
        given["change"] = None if record.get("change") is None else LossChange(**record["change"])
        return cls(**given)
