"""What an option may be, in one sentence each."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from fullrank.errors import ModelError

__all__ = ["choice", "number", "refuse", "switch", "whole"]


def refuse(name: str, value: object, accepted: str) -> None:
    """Say what was found and what is accepted.

    Args:
        name: of the option.
        value: found.
        accepted: in words.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"{name}={value!r} must be {accepted}.")


def choice(name: str, value: object, among: tuple[Any, ...]) -> None:
    """One of several."""
    if value not in among:
        refuse(name, value, f"one of {', '.join(map(repr, among))}")


def switch(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def whole(name: str, value: object, least: int) -> None:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        refuse(name, value, f"a whole number of {least} or more")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """A finite number from `low` up to, and without, `high`."""
    plain = not isinstance(value, bool) and isinstance(value, Real)
    if not plain or not math.isfinite(value) or not low <= value < high:
        above = "" if low == -math.inf else f" of {low:g} or more"
        below = "" if high == math.inf else f" below {high:g}"
        refuse(name, value, f"a finite number{above}{below}")
