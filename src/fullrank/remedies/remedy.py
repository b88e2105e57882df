"""What a remedy declares, and the decorator that makes one of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fullrank.edit import Edit
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.spec.grammar import close_matches

__all__ = ["Acts", "Exactness", "Remedy", "remedy"]

Exactness = Literal["identity-now", "init-only", "changes-function"]
"""At the default parameters: the function is the same at the moment of applying; the remedy is meant for fresh weights;
or the function is another one at once."""

Acts = Literal["attention", "weights", "residual", "norm", "stream", "tokens", "loss", "state space"]

Apply = Callable[..., Edit]


@dataclass(frozen=True)
class Remedy:
    """A change of a model that is to repair a failure of signal propagation.

    Attributes:
        name: as on the command line: `center-attention`.
        title: a few words.
        addresses: names of the failures it is for.
        acts_on: where it acts.
        exactness: what happens to the function at the moment of applying, at the default parameters.
        formula: what it computes, with the symbols of the paper.
        papers: the works it is from, with arXiv number or venue.
        keys: of the paper cards behind it.
        parameters: what it can be told.
        limits: when it does not help, or harms; a sentence each.
        cost: in time, memory and parameters; whether fused kernels stay.
        structural: whether a model that has it must be built with it before its weights can be loaded.
        apply: makes the edit.
        only_weights: values of parameters at which a structural remedy changes nothing but values of weights.
    """

    name: str
    title: str
    addresses: tuple[str, ...]
    acts_on: Acts
    exactness: Exactness
    formula: str
    papers: tuple[str, ...]
    keys: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    limits: tuple[str, ...]
    cost: str
    structural: bool
    apply: Apply
    only_weights: Mapping[str, Any] = field(default_factory=dict)

    def is_structural(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it is structural with these parameters."""
        kept = self.only_weights
        return self.structural and not (kept and all(parameters[name] == value for name, value in kept.items()))

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, those that were given and defaults.

        Returns:
            Values by name.

        Raises:
            RemedyError: for one that the remedy has not, or a value out of range.
        """
        names = [parameter.name for parameter in self.parameters]
        for name in given:
            if name not in names:
                has = f"its parameters are {', '.join(names)}" if names else "it has no parameters"
                raise RemedyError(f"{name}= is no parameter of {self.name}{close_matches(name, names)}; {has}.")
        return {one.name: one.checked(self.name, given.get(one.name, one.default)) for one in self.parameters}


def remedy(
    name: str,
    title: str,
    *,
    addresses: Sequence[str],
    acts_on: Acts,
    exactness: Exactness,
    formula: str,
    papers: Sequence[str],
    keys: Sequence[str] = (),
    parameters: Sequence[Parameter] = (),
    limits: Sequence[str] = (),
    cost: str,
    structural: bool = True,
    only_weights: Mapping[str, Any] | None = None,
) -> Callable[[Apply], Remedy]:
    """Make a remedy of a function `(patient, **parameters) → Edit`.

    The function's keyword-only arguments and their defaults must be those of `parameters`: they are checked at import,
    so that the catalogue cannot say one thing and the code do another.

    Returns:
        The decorator.

    Raises:
        TypeError: where they differ.
    """

    def declare(apply: Callable[..., Edit]) -> Remedy:
        signature = list(inspect.signature(apply).parameters.values())
        found = {one.name: one.default for one in signature[1:] if one.kind is one.KEYWORD_ONLY}
        declared = {one.name: one.default for one in parameters}
        if found != declared or len(found) != len(signature) - 1:
            raise TypeError(f"{name}: the function takes {found} and the remedy declares {declared}.")
        return Remedy(
            name=name,
            title=title,
            addresses=tuple(addresses),
            acts_on=acts_on,
            exactness=exactness,
            formula=formula,
            papers=tuple(papers),
            keys=tuple(keys),
            parameters=tuple(parameters),
            limits=tuple(limits),
            cost=cost,
            structural=structural,
            apply=apply,
            only_weights=dict(only_weights or {}),
        )

    return declare
