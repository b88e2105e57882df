"""A parameter of a remedy: its default, its range, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fullrank.errors import RemedyError
from fullrank.spec.grammar import close_matches

__all__ = ["Parameter"]


@dataclass(frozen=True)
class Parameter:
    """What a remedy can be told.

    Attributes:
        name: as in Python and on the command line.
        says: what it is, in a few words.
        default: what is taken where nothing is given.
        kind: a `number`, an `integer`, a `switch` (True or False), a `choice` of words, `layers` (numbers of block
            calls, from 1), `sizes` (whole numbers from 1), or `numbers`, one or several.
        low: the least number that is accepted.
        high: the largest.
        above: a number that it must exceed, where `low` itself would be accepted too much.
        choices: words that are accepted, of a choice.
        optional: whether None is accepted, and means what `says` says.
    """

    name: str
    says: str
    default: Any
    kind: Literal["number", "integer", "switch", "choice", "layers", "sizes", "numbers"] = "number"
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def range(self) -> str:
        """What is accepted, in words."""
        if self.kind == "choice":
            words = " or ".join(", ".join(self.choices).rsplit(", ", 1))
        elif self.kind == "switch":
            words = "true or false"
        elif self.kind == "layers":
            words = "numbers of block calls, from 1"
        elif self.kind == "sizes":
            words = "whole numbers from 1"
        else:
            parts = [f"at least {self.low:g}"] if self.low > self.above else []
            parts += [f"above {self.above:g}"] if self.above >= self.low and self.above > -math.inf else []
            parts += [f"at most {self.high:g}"] if self.high < math.inf else []
            what = {"integer": "a whole number ", "numbers": "numbers "}.get(self.kind, "a number ")
            words = what + " and ".join(parts)
        return words.strip() + (" or none" if self.optional else "")

    def checked(self, remedy: str, value: Any) -> Any:
        """The value, in its type.

        Args:
            remedy: whose parameter it is, for the sentence.
            value: what was given.

        Returns:
            It.

        Raises:
            RemedyError: where it is of another kind or out of range.
        """
        if self.optional and (value is None or value == "none"):
            return None
        if self.kind == "choice" and isinstance(value, str) and value not in self.choices:
            hint = close_matches(value, self.choices)
            raise RemedyError(f"{self.name}={value!r} of {remedy} is not known{hint}; it is {self.range}.")
        found = self._read(value)
        if found is None:
            raise RemedyError(f"{self.name}={value!r} of {remedy} is not accepted; it is {self.range}.")
        return found

    def _read(self, value: Any) -> Any:
        if self.kind == "switch":
            return value if isinstance(value, bool) else None
        if self.kind == "choice":
            return value if value in self.choices else None
        if self.kind in ("layers", "sizes"):
            given = [value] if isinstance(value, int) else value
            whole = isinstance(given, list | tuple) and all(type(one) is int and one > 0 for one in given)
            return tuple(given) if whole and given else None
        if self.kind == "numbers":
            given = value if isinstance(value, list | tuple) else [value]
            return tuple(map(float, given)) if given and all(map(self._inside, given)) else None
        if not self._inside(value):
            return None
        if self.kind == "integer":
            return int(value) if value == int(value) else None
        return float(value)

    def _inside(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and self.low <= value <= self.high and value > self.above
