"""Which functions multiply an activation with a weight, and which axes of the weight are its outputs and its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.softmax import spelt_out

__all__ = ["Product", "factors_of", "is_product", "product_of"]

_MATMUL = frozenset({"matmul", "__matmul__", "mm", "bmm"})
_ADDED = frozenset({"addmm", "baddbmm", "addbmm"})
_LINEAR = frozenset({"linear"})
_CONVOLUTION = frozenset({"conv1d", "conv2d", "conv3d"})
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


@dataclass(frozen=True, eq=False)
class Product:
    """An activation times a weight.

    Attributes:
        node: the call.
        reads: the activation.
        weight: the weight as the function got it; None where it is packed out of sight.
        out_axes: of the weight.
        in_axes: of the weight.
        lead_axes: of the weight: one matrix each.
        features: axes of the result that hold the outputs, in the order of `out_axes`.
        contracted: axes of the activation that are summed over.
    """

    node: Node
    reads: Ref
    weight: Ref | None
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    lead_axes: tuple[int, ...]
    features: tuple[int, ...]
    contracted: tuple[int, ...]


def is_product(node: Node) -> bool:
    """Whether a call is a product of two matrices, whatever they are."""
    name = node.name
    return name in _MATMUL or name in _ADDED or name == "einsum"


def factors_of(node: Node) -> tuple[Ref, Ref] | None:
    """The two factors of a matrix product."""
    if node.name == "einsum":
        found = [ref for ref in _flat(node.args[1:]) if isinstance(ref, Ref)]
    else:
        found = _positional(
            node, 1 if node.name in _ADDED else 0, ("batch1", "batch2", "mat1", "mat2", "mat2", "other")
        )
    return (found[0], found[1]) if len(found) == 2 else None


def product_of(node: Node) -> Product | None:
    """The product that a call is, or None where it is none of an activation with a weight.

    Args:
        node: the call.

    Returns:
        The activation, the weight and their axes.
    """
    name = node.name
    if name in _LINEAR:
        found = _positional(node, 0, ("input", "weight"))
        if len(found) >= 2:
            return _linear(node, found[0], found[1])
        return _packed(node)
    if name in _CONVOLUTION:
        return _convolution(node)
    if name in _GROUPED:
        found = _positional(node, 0, ("input", "weight"))[:2]
        return _matmul(node, found[0], found[1]) if len(found) == 2 and _weight_like(found[1]) else None
    if name == "einsum":
        return _einsum(node)
    if name in _MATMUL or name in _ADDED:
        factors = factors_of(node)
        if factors is None:
            return None
        left, right = factors
        if _weight_like(right):
            return _matmul(node, left, right)
        return _left(node, left, right) if _weight_like(left) else None
    return _packed(node)


def _weight_like(ref: Ref) -> bool:
    return ref.node.stored and not ref.node.data and len(ref.shape) >= 2


def _linear(node: Node, reads: Ref, weight: Ref) -> Product | None:
    if not weight.node.stored or len(weight.shape) != 2:
        return None
    last = len(node.shapes[0]) - 1
    return Product(node, reads, weight, (0,), (1,), (), (last,), (len(reads.shape) - 1,))


def _matmul(node: Node, reads: Ref, weight: Ref) -> Product:
    n = len(weight.shape)
    last = len(node.shapes[0]) - 1
    lead = tuple(axis for axis in range(n - 2) if weight.shape[axis] > 1)
    return Product(node, reads, weight, (n - 1,), (n - 2,), lead, (last,), (len(reads.shape) - 1,))


def _left(node: Node, weight: Ref, reads: Ref) -> Product:
    n = len(weight.shape)
    lead = tuple(axis for axis in range(n - 2) if weight.shape[axis] > 1)
    return Product(
        node, reads, weight, (n - 2,), (n - 1,), lead, (len(node.shapes[0]) - 2,), (max(len(reads.shape) - 2, 0),)
    )


def _convolution(node: Node) -> Product | None:
    found = _positional(node, 0, ("input", "weight"))[:2]
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    if len(found) != 2 or not found[1].node.stored or groups != 1:
        return None
    n = len(found[1].shape)
    axis = len(node.shapes[0]) - (n - 2) - 1
    return Product(node, found[0], found[1], (0,), tuple(range(1, n)), (), (axis,), (axis,))


def _einsum(node: Node) -> Product | None:
    equation = node.args[0] if node.args else None
    factors = factors_of(node)
    if not isinstance(equation, str) or factors is None or "->" not in equation:
        return None
    given = equation.replace(" ", "")
    inputs, out = spelt_out(given, factors)  # an ellipsis stands for as many axes as are left
    labels = inputs.split(",")
    mine = 1 if _weight_like(factors[1]) else 0 if _weight_like(factors[0]) else None
    if mine is None:
        return None
    weight, reads = factors[mine], factors[1 - mine]
    w, x = labels[mine], labels[1 - mine]
    if "." in given.split("->")[0].split(",")[mine]:
        return None
    if len(w) != len(weight.shape) or len(x) != len(reads.shape) or len(out) != len(node.shapes[0]):
        return None
    outs = [label for label in w if label in out and label not in x]
    ins = [label for label in w if label in x and label not in out]
    lead = [label for label in w if label in x and label in out]
    if not outs or not ins:
        return None
    return Product(
        node,
        reads,
        weight,
        tuple(map(w.index, outs)),
        tuple(map(w.index, ins)),
        tuple(map(w.index, lead)),
        tuple(map(out.index, outs)),
        tuple(map(x.index, ins)),
    )


def _packed(node: Node) -> Product | None:
    """A kernel of quantised weights: an object that holds them, or an integer parameter, beside one activation."""
    held = any(isinstance(value, torch.ScriptObject) for value in _flat(node.args))
    integers = [r for r in node.parents if r.node.stored and not r.node.data and not r.node.floating]
    reads = [ref for ref in node.parents if ref.node.data and ref.node.floating]
    if not node.floating or not reads or not (held or integers):
        return None
    if not held and (node.name in _ELEMENTWISE or len(reads) != 1):
        return None
    weight = max(integers, key=lambda ref: ref.shape.numel()) if integers else None
    last = len(node.shapes[0]) - 1
    return Product(node, reads[0], weight, (), (), (), (last,), (len(reads[0].shape) - 1,))


_ELEMENTWISE = frozenset({"add", "add_", "__add__", "mul", "mul_", "__mul__", "div", "where", "sub", "__sub__"})


def _positional(node: Node, start: int, names: tuple[str, ...]) -> list[Ref]:
    found = [value for value in node.args[start:] if isinstance(value, Ref)]
    for name in names:
        value = node.kwargs.get(name)
        if isinstance(value, Ref) and value not in found:
            found.append(value)
    return found


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [item for value in values for item in _flat(value)]
    return [values]
