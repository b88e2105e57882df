"""One variant of a screening: what it changed, what that restored, and how it trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, Literal, get_args

__all__ = ["AS_IT_IS", "GROUPS", "Group", "Healthy", "Kind", "LossChange", "Restored", "Scale", "Screened"]

Kind = Literal["as it is", "remedy", "recommendation"]
Healthy = Literal["low", "high", "both"]
Scale = Literal["linear", "log"]
Group = Literal[
    "as it is",
    "restores",
    "restores in part",
    "does not restore",
    "nothing to restore",
    "no reference",
    "shows only in training",
    "could not be read",
    "failed in training",
    "could not be applied",
]

AS_IT_IS: Literal["as it is"] = "as it is"
GROUPS: tuple[Group, ...] = get_args(Group)

_HALF = 0.5  # of the way from what it was to where it should be
_IDLE = 0.05  # of a block's input: what its blocks add, less being doing nothing
_SAME = 1e-4  # of a number: rounding of a function that stayed as it is
_TINY = 1.2e-38  # the smallest normal number of 32 bits: 0 has a logarithm too, a bad one


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
        end: the healthy end of the metric, where the vocabulary states one.
        healthy: on which side of the target it is no worse; `both` where neither is.
        scale: whether differences count, or ratios.
        tolerance: a difference that is none, in that scale: of logarithms where ratios count.
        failure: whose own number it is; empty for what is compared besides.
    """

    metric: str
    place: str
    before: float | None
    after: float | None
    reference: float | None = None
    null: float | None = None
    end: float | None = None
    healthy: Healthy = "both"
    scale: Scale = "linear"
    tolerance: float = 0.02
    failure: str = ""

    @property
    def target(self) -> float | None:
        """Where it should be: the reference; where there is none or the model stands there already, the null or end."""
        other = self.end if self.null is None else self.null
        if self.before is None or self.reference is None:
            return other
        alike = abs(self._on_scale(self.before) - self._on_scale(self.reference)) <= self.tolerance
        return other if alike else self.reference

    @property
    def share(self) -> float | None:
        """How much of the way from `before` to `target` it came: 1 all of it, 0 none, below 0 further away.

        Beyond the target on the healthy side is no way at all: tokens that differ more than at initialisation are no
        worse. None where there is no way to go, or nothing to compare with.
        """
        way, left = self._way(self.before), self._way(self.after)
        return None if way is None or left is None or way <= self.tolerance else 1 - left / way

    @property
    def missing(self) -> bool | None:
        """Whether the model as it is stands away from the target; None where there is no target."""
        way = self._way(self.before)
        return None if way is None else way > self.tolerance

    @property
    def moved(self) -> bool:
        """Whether it is another number than before, by more than rounding."""
        if self.before is None or self.after is None:
            return self.before is not self.after
        return not math.isclose(self.before, self.after, rel_tol=_SAME)

    def to_record(self) -> dict[str, Any]:
        """In plain values, with what follows from them."""
        return asdict(self) | {"target": self.target, "share": self.share}

    def _way(self, value: float | None) -> float | None:
        """How far a value is from the target, on the side that is not healthy."""
        target = self.target
        if value is None or target is None or math.isnan(value):
            return None
        beyond = self._on_scale(value) - self._on_scale(target)
        return {"low": max(0.0, beyond), "high": max(0.0, -beyond), "both": abs(beyond)}[self.healthy]

    def _on_scale(self, value: float) -> float:
        return math.log(max(value, _TINY)) if self.scale == "log" else value


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
        stumbled: where it failed once it was applied: while it was read, or in training; empty where it did not.
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
    stumbled: Literal["", "reading", "training"] = ""

    @property
    def deciding(self) -> tuple[Restored, ...]:
        """The numbers that say whether it restores: the failures' own; where no failure is named, all."""
        return tuple(one for one in self.restored if one.failure) or self.restored

    @property
    def shares(self) -> dict[str, float]:
        """Of every failure the median share of the way that its own numbers came; of those that have a way to come.

        Where no failure is named, of all numbers, under the empty name.
        """
        failures = dict.fromkeys(one.failure for one in self.deciding)
        medians = {name: _median(one for one in self.deciding if one.failure == name) for name in failures}
        return {name: share for name, share in medians.items() if share is not None}

    @property
    def share(self) -> float | None:
        """That of the failure that came least; None where there is no way to come."""
        return min(self.shares.values(), default=None)

    @property
    def restored_failures(self) -> tuple[str, ...]:
        """Failures whose numbers came at least half of the way."""
        return tuple(name for name, share in self.shares.items() if share >= _HALF)

    @property
    def share_besides(self) -> float | None:
        """That of the other numbers, likeness and residual where the failure is another; it decides nothing."""
        return _median(one for one in self.restored if one not in self.deciding)

    @property
    def leaves(self) -> bool:
        """Whether the other numbers stay away from where they should be, whatever the deciding ones do."""
        return self.share_besides is not None and self.share_besides < _HALF

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
        if self.stumbled == "training":
            return "failed in training"
        if self.stumbled == "reading" or (self.deciding and all(one.after is None for one in self.deciding)):
            return "could not be read"
        if not any(one.moved for one in self.restored):
            return "shows only in training"
        if self.shares:
            restored = len(self.restored_failures)
            return (
                "restores" if restored == len(self.shares) else "restores in part" if restored else "does not restore"
            )
        missing = {one.missing for one in self.deciding if one.before is not None}
        if True in missing:  # and none of these could be read afterwards
            return "could not be read"
        return "nothing to restore" if False in missing else "no reference"

    def to_record(self) -> dict[str, Any]:
        """In dicts, lists and plain values, with what follows from them: `from_record` passes that over."""
        derived = {"group": self.group, "share": self.share, "idle": self.idle}
        return asdict(self) | {"restored": [one.to_record() for one in self.restored]} | derived

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Screened:
        """What `to_record` gave."""
        given = _known(cls, record)
        given["restored"] = tuple(Restored(**_known(Restored, one)) for one in record.get("restored") or ())
        change = record.get("change")
        given["change"] = None if change is None else LossChange(**_known(LossChange, change))
        return cls(**given)


def _median(numbers: Iterable[Restored]) -> float | None:
    shares = [share for one in numbers if (share := one.share) is not None]
    return median(shares) if shares else None


def _known(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: record[one.name] for one in fields(kind) if one.name in record}
