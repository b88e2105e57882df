"""Which remedies are asked for, and with what parameters: names, `name?parameter=value`, lists and mappings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from fullrank.errors import RemedyError, SpecError
from fullrank.remedies.catalogue import remedy_of
from fullrank.remedies.remedy import Remedy
from fullrank.spec.grammar import options_of

__all__ = ["Asked", "Prescription", "asked_for"]

Prescription = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
"""`"center-attention"`, `"temperature?scale=2"`, a list of these, or a mapping from names to parameters."""


@dataclass(frozen=True)
class Asked:
    """A remedy with all its parameters.

    Attributes:
        remedy: which.
        parameters: values by name, checked.
    """

    remedy: Remedy
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        changed = [one for one in self.remedy.parameters if self.parameters[one.name] != one.default]
        words = "&".join(f"{one.name}={_word(self.parameters[one.name])}" for one in changed)
        return self.remedy.name + (f"?{words}" if words else "")


def asked_for(names: Prescription, parameters: Mapping[str, Any]) -> tuple[Asked, ...]:
    """Read what was asked for.

    Args:
        names: one or several remedies.
        parameters: for the remedies that have them; with several remedies a parameter goes to the one that has it.

    Returns:
        Remedies in the order asked, each once.

    Raises:
        RemedyError: for an unknown name, one named twice, a parameter that none or several have, a value out of range.
    """
    given = list(_pairs(names))
    if not given:
        raise RemedyError("no remedy is named; `fullrank remedies` lists them.")
    remedies = [remedy_of(name) for name, _ in given]
    twice = [one.name for index, one in enumerate(remedies) if one in remedies[:index]]
    if twice:
        raise RemedyError(f"{twice[0]} is named twice; a remedy is applied once.")
    chosen = [dict(own) for _, own in given]
    for name, value in parameters.items():
        takers = [index for index, one in enumerate(remedies) if name in [each.name for each in one.parameters]]
        if len(takers) > 1:
            several = " and ".join(remedies[index].name for index in takers)
            raise RemedyError(f"{name}= is a parameter of {several}; write it as {remedies[takers[0]].name}?{name}=….")
        if not takers and len(remedies) > 1:
            raise RemedyError(f"{name}= is a parameter of none of {', '.join(one.name for one in remedies)}.")
        to = takers[0] if takers else 0  # its remedy says which there are
        if name in chosen[to]:
            raise RemedyError(f"{name}= of {remedies[to].name} is given twice.")
        chosen[to][name] = value
    return tuple(Asked(one, one.checked(own)) for one, own in zip(remedies, chosen, strict=True))


def _pairs(names: Prescription) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if isinstance(names, Mapping):
        for name, own in names.items():
            if not isinstance(name, str) or not isinstance(own, Mapping):
                raise RemedyError(f"{name!r}: {own!r} names no remedy with a mapping of its parameters.")
            yield name, own
        return
    if isinstance(names, Set | bytes) or not isinstance(names, Iterable):
        raise RemedyError(
            f"remedies are a name, a list of names, or a mapping from names to parameters, and {type(names).__name__} "
            "was given."
        )
    for text in [names] if isinstance(names, str) else names:
        if not isinstance(text, str):
            raise RemedyError(f"a remedy is named by text, and {type(text).__name__} was given.")
        name, _, query = text.partition("?")
        try:
            yield name, {one: _number(value) for one, value in options_of(query, f"remedy {text!r}")}
        except SpecError as reason:
            raise RemedyError(str(reason)) from None


def _number(value: Any) -> Any:
    """What is a number in Python and not in JSON, `.5`, `5.`, `+1`, and several with commas: `2,1`, `(2, 1)`."""
    if not isinstance(value, str):
        return value
    in_brackets = value.startswith("(") and value.endswith(")")
    several = (value[1:-1].removesuffix(",") if in_brackets else value).split(",")
    try:
        read = [int(one) if one.strip().isdecimal() else float(one) for one in several]
    except ValueError:
        return value
    return read if in_brackets or len(read) > 1 else float(value)


def _word(value: Any) -> str:
    """As it can be written after the question mark."""
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value))
    if isinstance(value, bool | None):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
