"""Softmaxes of a model on their way to the values, in a form that the compiler can follow and that can be repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from fullrank.capture.tap import Tap

__all__ = ["CARRY", "PRODUCTS", "Softmax", "Softmaxes", "fits", "give_up"]

CARRY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "identity"}
    | {"dropout", "dropout_", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "view_as"}
    | {"__getitem__", "masked_fill", "masked_fill_", "nan_to_num", "narrow", "mul", "__mul__", "div"}
)
PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})
_DROPOUT = frozenset({"dropout", "dropout_"})

Step = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function and what it was called with; the first argument is what the step before returned."""


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax over the last axis and what was done with its result since.

    Attributes:
        logits: what was softmaxed.
        steps: the softmax and what followed.
        result: what came of it so far.
    """

    logits: Tensor
    steps: tuple[Step, ...]
    result: Tensor

    def again(self, logits: Tensor, *, dropout: bool = True) -> Tensor:
        """The same steps on other scores; dropout draws anew, or is left out."""
        func, args, kwargs = self.steps[0]
        if args:
            made = func(logits, *args[1:], **kwargs)
        else:
            made = func(**{**kwargs, "input": logits})
        for func, args, kwargs in self.steps[1:]:
            if not dropout and getattr(func, "__name__", "") in _DROPOUT:
                continue
            made = func(made, *args[1:], **kwargs)
        return made  # type: ignore[no-any-return]


class Softmaxes:
    """The softmaxes of one forward of a module. A list and identities, not a table of ids: compilers follow that."""

    def __init__(self) -> None:
        self._known: list[Softmax] = []

    def begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A softmax was made."""
        given = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(given, Tensor) and isinstance(output, Tensor) and dim in (-1, output.ndim - 1):
            self._known = [*self._known, Softmax(given, ((func, args, kwargs),), output)]

    def carry(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Something was done with a tensor; if it is known, so is the result."""
        found = self.find(args[0]) if args else None
        if found is not None and isinstance(output, Tensor):
            step = (func, args, kwargs)
            self._known = [*self._known, Softmax(found.logits, (*found.steps, step), output)]

    def find(self, tensor: Any) -> Softmax | None:
        """The softmax that a tensor comes from; where it was written into, with that step."""
        for softmax in reversed(self._known):
            if softmax.result is tensor:
                return softmax
        return None


def fits(softmax: Softmax, weights: Any, value: Any) -> bool:
    """Whether a product is one of a map over tokens, not of a router's choice, with values."""
    keys = softmax.logits.shape[-1]
    return (
        isinstance(value, Tensor)
        and weights.ndim > 2
        and value.shape[-2] == weights.shape[-1]
        and weights.shape[-1] in (keys, keys - 1)
    )


def give_up(weights: Tensor) -> None:
    """Tell who looks at the model that this map is not the one that meets the values."""
    if torch.compiler.is_compiling():
        return
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Tap):
            mode.softmaxes.give_up(weights)
