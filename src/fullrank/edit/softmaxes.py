"""Softmaxes of a model on their way to the values, in a form that the compiler can follow and that can be repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CARRY", "PRODUCTS", "SOFTMAX", "Softmax", "Softmaxes", "arranged", "spelled_out"]

SOFTMAX = frozenset({"softmax", "special_softmax", "_softmax"})
CARRY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "identity"}
    | {"dropout", "dropout_", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "view_as"}
    | {"__getitem__", "masked_fill", "masked_fill_", "nan_to_num", "narrow", "mul", "__mul__", "div"}
)
PRODUCTS = {"matmul": 0, "__matmul__": 0, "bmm": 0, "baddbmm": 1}

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

    def again(self, logits: Tensor) -> Tensor:
        """The same steps on other scores; dropout draws anew."""
        func, args, kwargs = self.steps[0]
        if args:
            made = func(logits, *args[1:], **kwargs)
        else:
            made = func(**{**kwargs, "input": logits})
        for func, args, kwargs in self.steps[1:]:
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


def arranged(left: str, right: str, out: str) -> tuple[list[int], list[int], list[int]] | None:
    """How to bring an einsum of a map and values into (…, queries, keys), (…, keys, width) and (…, queries, width).

    Args:
        left: labels of the map.
        right: labels of the values.
        out: labels of the result.

    Returns:
        The order of axes of the three, or None where it is no such product.
    """
    key = left[-1]
    query = [label for label in left if label in out and label not in right]
    width = [label for label in right if label in out and label not in left]
    lead = [label for label in left if label in right and label != key]
    if key in out or key not in right or len(query) != 1 or len(width) != 1 or any(x not in out for x in lead):
        return None
    if len(lead) + 2 != len(left) or len(lead) + 2 != len(right) or len(out) != len(left):
        return None
    return (
        [left.index(label) for label in (*lead, *query, key)],
        [right.index(label) for label in (*lead, key, *width)],
        [out.index(label) for label in (*lead, *query, *width)],
    )


def spelled_out(equation: str, factors: list[Tensor]) -> str:
    """An equation without spaces, the axes of an ellipsis with labels of their own."""
    equation = equation.replace(" ", "")
    hidden = 0
    for labels, factor in zip(equation.split("->")[0].split(","), factors, strict=True):
        if "..." in labels:
            hidden = max(hidden, factor.ndim - len(labels) + 3)
    unused = [label for label in "ABCDEFGH" if label not in equation]
    return equation.replace("...", "".join(unused[:hidden]))
