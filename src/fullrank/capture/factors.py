"""Which tensors made the logits of a softmax: the factors of the product that they come from."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fullrank.capture.calls import KernelCall
from fullrank.capture.live import Live, Wire, permuted, seen_through
from fullrank.capture.marks import OUTSIDE, Marks
from fullrank.capture.softmax import spelt_out
from fullrank.capture.tensors import tensors_in

__all__ = ["Factors"]

_PRODUCTS = {"matmul": 0, "__matmul__": 0, "bmm": 0, "baddbmm": 1}
_CARRY = frozenset(
    {
        "max",
        "min",
        "mul",
        "mul_",
        "div",
        "div_",
        "true_divide",
        "add",
        "add_",
        "sub",
        "sub_",
        "tanh",
        "clamp",
        "maximum",
        "minimum",
    }
    | {"masked_fill", "masked_fill_", "where", "nan_to_num", "cat", "__getitem__", "dropout", "dropout_", "identity"}
    | {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "view", "view_as"}
    | {"reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "softmax", "special_softmax", "_softmax"}
)
"""Functions that leave rows and columns where they are. A transposition is not among them: after it, rows would be
taken for columns."""

_LOST = "the product that made its logits was not found"
_SEVERAL = "its logits are the sum of several products"


@dataclass(frozen=True, eq=False)
class _Product:
    """The product of queries and keys that a tensor was made of, or why it cannot be told."""

    query: Wire | None
    key: Wire | None
    rows: int
    columns: int
    entries: int
    of_streams: bool  # both factors were computed from some stack's stream
    reason: str = ""


class Factors:
    """Follows products of two tensors to the softmax that they feed and on to the values.

    Keeps the factors of the products of the blocks that are running, which the graph keeps for the backward anyway, and
    nothing outside of blocks or of what needs no gradients.
    """

    def __init__(self) -> None:
        self.inside = False
        self._known: dict[int, tuple[weakref.ref[Tensor], _Product]] = {}

    def clear(self) -> None:
        """Let go of everything: no block is running."""
        self.inside = False
        self._known.clear()

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, marks: Marks) -> None:
        """Take in one function call."""
        if not self.inside or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if name in _PRODUCTS:
            left, right = (*args[_PRODUCTS[name] :], *kwargs.values(), None, None)[:2]
            if isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim > 2 and right.ndim > 2:
                flipped = (*range(right.ndim - 2), right.ndim - 1, right.ndim - 2)
                self._keep(output, Wire(left), permuted(right, flipped), marks)
        elif name == "einsum":
            self._einsum(args, output, marks)
        elif name in _CARRY and self._known:
            self._carry(name, args, kwargs, output)

    def complete(
        self, call: KernelCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Live:
        """The tensors of the call that the product of a map with values has completed.

        Args:
            call: the call as it was read from that product.
            name: of the function.
            args: what it was called with.
            kwargs: by name.
            output: what it returned.

        Returns:
            Queries and keys from the product that made the logits, values and output from this one.
        """
        if name == "einsum":
            equation, *factors = args
            factors = list(factors[0]) if len(factors) == 1 and isinstance(factors[0], tuple | list) else factors
            mine = 0 if self._find(factors[0]) is not None and self._find(factors[1]) is None else 1
            mine = mine if self._find(factors[mine]) is not None else 0
            inputs, out = spelt_out(equation.replace(" ", ""), factors)
            left, right = inputs.split(",")[mine], inputs.split(",")[1 - mine]
            weights, value = factors[mine], factors[1 - mine]
            lead = [label for label in left[:-1] if label in right]
            query = [label for label in left if label in out and label not in right]
            width = [label for label in right if label in out and label not in left]
            made = permuted(output, tuple(out.index(label) for label in (*lead, *query, *width)))
        else:
            weights, value = (*args[_PRODUCTS.get(name, 0) :], *kwargs.values())[:2]
            made = Wire(output)
        arrange = None if call.value is None else seen_through(call.value, value)
        wire = None if arrange is None else Wire(value, arrange)
        product = self._find(weights)
        if product is None:
            return Live(None, None, wire, made, _LOST)
        fits = product.rows == weights.shape[-2] and weights.shape[-1] in (product.columns, product.columns + 1)
        if not fits:
            return Live(None, None, wire, made, _LOST)
        return Live(product.query, product.key, wire, made, product.reason)

    def _einsum(self, args: tuple[Any, ...], output: Tensor, marks: Marks) -> None:
        equation, *factors = args
        if len(factors) == 1 and isinstance(factors[0], tuple | list):
            factors = list(factors[0])
        if not isinstance(equation, str) or len(factors) != 2 or "->" not in equation:
            return
        inputs, out = spelt_out(equation.replace(" ", ""), factors)
        labels = inputs.split(",")
        if len(out) < 3 or any(len(set(x)) != len(x) for x in (*labels, out)):
            return
        summed = [label for label in labels[0] if label in labels[1] and label not in out]
        first = 0 if out[-2] in labels[0] else 1
        query, key = labels[first], labels[1 - first]
        lead = out[:-2]
        if len(summed) != 1 or out[-1] not in key or out[-2] in key or out[-1] in query:
            return
        if any(label not in query or label not in key for label in lead) or len(query) != len(lead) + 2 != len(key):
            return
        self._keep(
            output,
            permuted(factors[first], tuple(query.index(x) for x in (*lead, out[-2], summed[0]))),
            permuted(factors[1 - first], tuple(key.index(x) for x in (*lead, out[-1], summed[0]))),
            marks,
        )

    def _keep(self, output: Tensor, query: Wire, key: Wire, marks: Marks) -> None:
        of_streams = all(marks.of(wire.tensor) & ~OUTSIDE for wire in (query, key))
        rows, columns = output.shape[-2:]
        self._know(output, _Product(query, key, rows, columns, output.numel(), of_streams))

    def _carry(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        found: list[_Product] = []
        for tensor in (*tensors_in(args), *tensors_in(kwargs)):
            product = self._find(tensor)
            if product is None or any(product is other for other in found):
                continue
            more = (product.entries // product.columns) * (product.columns + 1)  # a sink column may come or go
            if output.numel() in (product.entries, more):
                found.append(product)
        if len(found) > 1:
            both = [product for product in found if product.of_streams]
            if len(both) != 1:
                first = found[0]
                lost = _Product(None, None, first.rows, first.columns, first.entries, True, _SEVERAL)
                self._know(output, lost)
                return
            found = both
        if found:
            self._know(output, found[0])

    def _know(self, tensor: Tensor, product: _Product) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), product)

    def _find(self, tensor: Any) -> _Product | None:
        found = self._known.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return found[1] if found is not None and found[0]() is tensor else None
