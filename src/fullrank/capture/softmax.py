"""Which softmax is attention: the one whose result becomes a factor of a product. The other factor is V."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.calls import KernelCall
from fullrank.capture.marks import Marks
from fullrank.capture.tensors import tensors_in

__all__ = ["SOFTMAX", "SoftmaxTrace", "axes_of_product", "spelt_out"]

SOFTMAX = frozenset({"softmax", "special_softmax", "_softmax"})
_CARRY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "identity"}
    | {"dropout", "dropout_", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "view_as"}
    | {"__getitem__", "masked_fill", "masked_fill_", "nan_to_num", "where", "narrow", "mul", "div"}
)
_PRODUCTS = {"matmul": 0, "__matmul__": 0, "bmm": 0, "mm": 0, "baddbmm": 1}


@dataclass(eq=False)
class _Softmax:
    """One softmax and what became of it so far."""

    logits: Tensor
    shape: torch.Size  # of the softmax
    last: bool  # over the last dimension
    where: str = ""  # the module that called it
    used: bool = False
    dropped: bool = False  # dropout has acted on it since


class SoftmaxTrace:
    """Follows softmax results to the products they become a factor of. Keeps none of the results alive.

    Attributes:
        where: name of the module that runs, where somebody keeps it up to date.
        pieces: names of the modules in which a map over heads was left without values, or was multiplied with what
            other softmaxes gave and nothing else: attention there is made of pieces, and none of them is its map.
    """

    def __init__(self) -> None:
        self.where = ""
        self.pieces: set[str] = set()
        self._known: dict[int, tuple[weakref.ref[Tensor], _Softmax]] = {}
        self._alone: dict[int, weakref.ref[Tensor]] = {}  # computed from softmaxes and from nothing else of the stream
        self._open: list[_Softmax] = []

    def see(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, marks: Marks, heads: int | None
    ) -> KernelCall | None:
        """Take in one function call.

        Returns:
            The attention call that this function completes, or None.
        """
        if name in SOFTMAX and isinstance(output, Tensor):
            self._begin(args, kwargs, output)
            return None
        if not self._known:
            return None
        call = self._use(name, args, kwargs, output, marks, heads)
        if call is None:
            self._follow(args, kwargs, output, marks)
        return call

    def _use(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, marks: Marks, heads: int | None
    ) -> KernelCall | None:
        if name in _CARRY:
            found = self._find(args[0]) if args else None
            if found is not None and isinstance(output, Tensor):
                # the map is what the softmax gave; dropout belongs to training, as in the fused kernel
                found.dropped |= name.startswith("dropout") and output is not args[0]
                self._know(output, found)
        elif name in _PRODUCTS:
            left, right = (*args[_PRODUCTS[name] :], *kwargs.values(), None, None)[:2]
            found = self._find(left)
            if found is not None and isinstance(right, Tensor) and not found.used:
                return self._complete(found, left, right, marks, heads)
        elif name == "einsum":
            return self._einsum(args, marks, heads)
        return None

    def give_up(self, tensor: Tensor) -> None:
        """A map in whose place an edit puts another one: it meets no values, and is nothing unseen."""
        found = self._find(tensor)
        if found is not None:
            found.used = True

    def take_unused(self) -> list[torch.Size]:
        """Shapes of the softmaxes that met no values since the last question."""
        unused = [softmax for softmax in self._open if not softmax.used]
        self.pieces |= {softmax.where for softmax in unused if len(softmax.shape) > 3 and softmax.shape[-2] > 1}
        self._open.clear()
        self._known.clear()
        self._alone.clear()
        return [softmax.shape for softmax in unused]

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(given, Tensor) or not isinstance(dim, int) or output.ndim < 2:
            return
        last = dim in (-1, output.ndim - 1)
        softmax = _Softmax(given.detach(), output.shape, last, self.where)
        self._open.append(softmax)
        self._know(output, softmax)
        self._alone[id(output)] = weakref.ref(output)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, marks: Marks) -> None:
        """What is computed from softmaxes and from nothing else that a block is called with."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        given = [tensor for tensor in (*tensors_in(args), *tensors_in(kwargs)) if tensor.is_floating_point()]
        alone = [self._is_alone(tensor) for tensor in given]
        if any(alone) and all(own or not marks.of(tensor) for own, tensor in zip(alone, given, strict=True)):
            self._alone[id(output)] = weakref.ref(output)

    def _is_alone(self, tensor: Tensor) -> bool:
        found = self._alone.get(id(tensor))
        return found is not None and found() is tensor

    def _einsum(self, args: tuple[Any, ...], marks: Marks, heads: int | None) -> KernelCall | None:
        equation, *factors = args
        if len(factors) == 1 and isinstance(factors[0], tuple | list):
            factors = list(factors[0])
        if not isinstance(equation, str) or len(factors) != 2 or "->" not in equation:
            return None
        inputs, out = spelt_out(equation.replace(" ", ""), factors)
        labels = inputs.split(",")
        for mine, other in ((0, 1), (1, 0)):
            found = self._find(factors[mine])
            if found is None or found.used or not isinstance(factors[other], Tensor):
                continue
            arranged = _arrange(factors[mine], labels[mine], factors[other], labels[other], out)
            if arranged is None:
                continue
            return self._complete(found, *arranged[:2], marks, heads, source=factors[other], permuted=arranged[2])
        return None

    def _complete(
        self,
        found: _Softmax,
        weights: Tensor,
        value: Tensor,
        marks: Marks,
        heads: int | None,
        source: Tensor | None = None,
        permuted: tuple[int, ...] | None = None,
    ) -> KernelCall | None:
        if not found.last:
            return None
        if self._is_alone(value if source is None else source):
            self.pieces.add(found.where)
            found.used = True
            return None
        keys = found.shape[-1]
        if value.shape[-2] != weights.shape[-1] or weights.shape[-1] not in (keys, keys - 1):
            return None
        logits: Tensor | None = found.logits[
            ..., : weights.shape[-1]
        ]  # the last column may be a sink, dropped before V
        if permuted is not None and logits is not None:
            logits = logits.permute(permuted) if logits.ndim == len(permuted) else None
        if found.dropped:
            if logits is None or logits.numel() != weights.numel():
                return None
            before = found.logits.softmax(-1).to(weights.dtype)[..., : weights.shape[-1]]
            weights = (before.permute(permuted) if permuted is not None else before).reshape(weights.shape)
        if logits is not None and logits.numel() != weights.numel():
            logits = None
        # the softmax's own shape tells the heads apart where the product folds them into the batch
        if logits is not None and logits.ndim > weights.ndim:
            lead = logits.shape[:-2]
            weights = weights.reshape(logits.shape)
            if value.shape[0] == lead.numel():
                value = value.reshape(*lead, *value.shape[-2:])
        elif logits is not None and logits.shape != weights.shape:
            logits = logits.reshape(weights.shape)
        found.used = True
        found.logits = found.logits[:0]  # the map may be large: do not keep it
        return KernelCall(
            kernel="softmax",
            value=value.detach(),
            sources=marks.of(source if source is not None else value),
            dtype=value.dtype,
            weights=weights.detach(),
            logits=logits,
            sink_column=weights.shape[-1] == keys - 1,
            heads=heads,
        )

    def _know(self, tensor: Tensor, softmax: _Softmax) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), softmax)

    def _find(self, tensor: Any) -> _Softmax | None:
        found = self._known.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return found[1] if found is not None and found[0]() is tensor else None


def spelt_out(equation: str, factors: Sequence[Any]) -> tuple[str, str]:
    """The two sides of an einsum's equation with a letter for each axis that an ellipsis stands for."""
    inputs, out = equation.split("->")
    sides = inputs.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    counts = [len(getattr(one, "shape", ())) - len(side) + 3 for one, side in zip(factors, sides, strict=False)]
    most = max([count for count, side in zip(counts, sides, strict=False) if "..." in side], default=0)
    letters = "".join(free[:most])
    spelt = [side.replace("...", letters[most - count :]) for count, side in zip(counts, sides, strict=False)]
    return ",".join(spelt), out.replace("...", letters)


def _arrange(
    weights: Tensor, left: str, value: Tensor, right: str, out: str
) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Bring the factors of an einsum into (…, queries, keys) and (…, keys, width), or None if it is no attention."""
    axes = axes_of_product(left, right, out)
    if axes is None or len(left) != weights.ndim or len(right) != value.ndim:
        return None
    return weights.permute(axes[0]), value.permute(axes[1]), axes[0]


def axes_of_product(left: str, right: str, out: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """How to bring an einsum of a map and values into (…, queries, keys), (…, keys, width) and (…, queries, width).

    Args:
        left: labels of the map.
        right: labels of the values.
        out: labels of the result.

    Returns:
        The order of axes of the three; None where it is no product of attention.
    """
    key = left[-1]
    query = [label for label in left if label in out and label not in right]
    width = [label for label in right if label in out and label not in left]
    lead = [label for label in left if label in right and label != key]
    if key in out or key not in right or len(query) != 1 or len(width) != 1 or any(x not in out for x in lead):
        return None
    if len(lead) + 2 != len(left) or len(lead) + 2 != len(right):
        return None
    return (
        tuple(left.index(label) for label in (*lead, *query, key)),
        tuple(right.index(label) for label in (*lead, key, *width)),
        tuple(out.index(label) for label in (*lead, *query, *width)),
    )
