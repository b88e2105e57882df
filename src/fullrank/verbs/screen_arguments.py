"""What a screening is asked for, read and checked before anything is examined."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fullrank.errors import RemedyError, TrialError
from fullrank.remedies import Asked, Prescription, asked_for
from fullrank.trials import Recommendation
from fullrank.trials import recommendations as named_recommendations

__all__ = ["joined", "rates_of", "recommendations_of", "seeds_of", "variants_of", "whole"]

_JOINT = re.compile(r"(?<![=&?])\s*\+\s*(?=[^\W\d])")  # before a name: the + of a number, 1e+2, is none


def joined(name: str, parameters: Mapping[str, Any] | None = None) -> tuple[Asked, ...]:
    """The remedies of one variant.

    Args:
        name: a remedy, or several joined by `+`.
        parameters: of them.

    Returns:
        In order.

    Raises:
        RemedyError: for an unknown remedy or a parameter out of range.
    """
    parts = [name] if not isinstance(name, str) else [part.strip() for part in _JOINT.split(name)]
    return asked_for(parts, parameters or {})


def variants_of(remedies: Prescription | None) -> dict[str, tuple[Asked, ...]] | None:
    """Every variant that is asked for, by name.

    Args:
        remedies: a name, several, or a mapping from names to parameters; None for those that the verdicts name.

    Returns:
        In order; None where none was asked for.

    Raises:
        RemedyError: for what names no remedies.
    """
    if remedies is None:
        return None
    if isinstance(remedies, Mapping):
        asked = [_with_parameters(name, own) for name, own in remedies.items()]
        found = {" + ".join(map(str, one)): one for one in asked}
    elif isinstance(remedies, bytes | set | frozenset) or not isinstance(remedies, Iterable):
        raise RemedyError(
            f"remedies= takes a name, a list of names or a mapping from names to parameters, and was given "
            f"{type(remedies).__name__}."
        )
    else:
        found = {name: joined(name) for name in ([remedies] if isinstance(remedies, str) else remedies)}
    if not found:
        raise RemedyError("remedies= names none; leave it out to try those that the verdicts name.")
    return found


def _with_parameters(name: Any, own: Any) -> tuple[Asked, ...]:
    if not isinstance(name, str) or not isinstance(own, Mapping):
        raise RemedyError(f"{name!r}: {own!r} names no remedy with a mapping of its parameters.")
    return joined(name, own)


def whole(name: str, value: Any, *, least: int, meaning: str = "") -> int:
    """A whole number that an argument is.

    Args:
        name: of the argument.
        value: what was given.
        least: accepted.
        meaning: of the least one, as the sentence ends.

    Returns:
        The value.

    Raises:
        TrialError: where it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TrialError(f"{name}={value!r} is no whole number{meaning}.")
    if value < least:
        raise TrialError(f"{name}={value} must not be {'negative' if not least else f'below {least}'}{meaning}.")
    return value


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """Seeds, each different.

    Args:
        seeds: what was given.

    Returns:
        Them.

    Raises:
        TrialError: for a single number, none, or the same one twice, which would be certain of nothing.
    """
    found = _several("seeds", seeds, "(0, 1, 2)")
    for seed in found:
        whole("seeds", seed, least=0)
    if len(set(found)) < len(found):
        raise TrialError(f"seeds={list(found)} hold one twice; a training is the same again with the same seed.")
    return found


def rates_of(rates: Any) -> tuple[float, ...]:
    """Learning rates, each different.

    Args:
        rates: what was given.

    Returns:
        Them.

    Raises:
        TrialError: for a single number, none, or what are no positive numbers.
    """
    found = _several("rates", rates, "(1e-3, 3e-3)")
    numbers = [one for one in found if isinstance(one, int | float) and not isinstance(one, bool)]
    good = [float(one) for one in numbers if 0 < one < math.inf]
    if len(set(good)) < len(found):
        raise TrialError(f"rates={list(found)}: expected different positive numbers.")
    return tuple(good)


def _several(name: str, values: Any, such: str) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TrialError(f"{name}={values!r} is no list; write it as {name}={such}.")
    found = tuple(values)
    if not found:
        raise TrialError(f"{name} is empty; at least one is needed, as in {name}={such}.")
    return found


def recommendations_of(names: str | Sequence[str] | None) -> tuple[Recommendation, ...]:
    """Recommendations by name.

    Args:
        names: one, several, or None for all.

    Returns:
        In the order asked for.

    Raises:
        TrialError: for a name that is none of them.
    """
    return named_recommendations([names] if isinstance(names, str) else names)
