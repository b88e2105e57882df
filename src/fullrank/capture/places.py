"""Which numbers of which parameter a product multiplies with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.products import Product
from fullrank.capture.ways import IDENTITY, MOVES

__all__ = ["Place", "place_of"]

_MADE_BY_PARTS = "it is put together from several parameters"


@dataclass(frozen=True, eq=False)
class Place:
    """The weight of a product within its parameter.

    Attributes:
        parameter: its name.
        out_axes: axes of the parameter (without that of experts) that make the rows.
        in_axes: the other axes.
        rows: (out,) for each output of the product its row; None where the first is the first and so on to the last.
        columns: (in,) likewise.
        expert: index on the axis of experts, −1 for all of them at once; None where there is no such axis.
        reason: why this is not known; then rows and columns mean nothing.
    """

    parameter: str
    out_axes: tuple[int, ...] = (0,)
    in_axes: tuple[int, ...] = (1,)
    rows: Tensor | None = None
    columns: Tensor | None = None
    expert: int | None = None
    reason: str = ""


def place_of(product: Product) -> Place:
    """Follow the weight of a product back to its parameter, through views only."""
    if product.weight is None:
        return Place(product.node.path, reason="its weights are packed in a quantised kernel's own object")
    traced = _trace(product.weight)
    if traced is None:
        return Place("", reason="the weight was not made from a parameter")
    leaf, chain, others = traced
    name = leaf.tensor
    if not leaf.floating:
        return Place(name, reason="it is quantised to integers")
    if not product.out_axes:
        return Place(name, reason="its weights are read by a kernel that is not known")
    if ".parametrizations." in name:
        module, _, rest = name.partition(".parametrizations.")
        return _placed(f"{module}.{rest.split('.')[0]}", _blank(product.weight.shape), product)
    if others:
        return Place(name, reason=_MADE_BY_PARTS)
    view = _view(_blank(leaf.shapes[0]), chain)
    if view is None:
        return Place(name, reason="the model uses it in an order that is no view of it")
    return _placed(name, view, product)


def _blank(shape: torch.Size) -> Tensor:
    return torch.empty(shape, device="meta")


def _trace(weight: Ref) -> tuple[Node, list[tuple[Node, int, Ref]], bool] | None:
    chain: list[tuple[Node, int, Ref]] = []
    others = False
    ref = weight
    while ref.node.name not in ("parameter", "buffer"):
        stored = [parent for parent in ref.node.parents if parent.node.stored and not parent.node.data]
        if not stored:
            return None
        # scales and zero points are smaller than what they scale
        largest = max(stored, key=lambda parent: (not parent.node.floating, parent.shape.numel()))
        same_size = [parent for parent in stored if parent.shape.numel() == largest.shape.numel() and parent != largest]
        others |= bool(same_size) or (ref.node.name in ("cat", "concat", "stack") and len(stored) > 1)
        chain.append((ref.node, ref.index, largest))
        ref = largest
    return ref.node, chain[::-1], others


def _view(blank: Tensor, chain: list[tuple[Node, int, Ref]]) -> Tensor | None:
    whole = blank
    for node, index, parent in chain:
        if node.name in IDENTITY:
            continue
        if node.name in MOVES:
            try:
                moved = _move(node, parent, blank)
            except (RuntimeError, TypeError, IndexError, ValueError):
                return None
            blank = moved[index] if isinstance(moved, tuple | list) else moved
        elif node.shapes[index] != blank.shape:
            return None
    return blank if blank.untyped_storage()._cdata == whole.untyped_storage()._cdata else None


def _move(node: Node, parent: Ref, blank: Tensor) -> Any:
    if node.name in ("view", "reshape"):
        return blank.view(node.shapes[0])
    args = list(node.args)
    if node.name == "__getitem__" and isinstance(args[1], Ref):
        kept = args[1].node.kept
        if kept is None or kept.dtype == torch.bool or kept.ndim > 1:
            raise ValueError("no view")
        return blank if kept.ndim else blank[int(kept)]  # one expert for each token: all experts
    args = [blank if value is parent or value == parent else value for value in args]
    assert node.function is not None
    return node.function(*args, **node.kwargs)


def _placed(name: str, view: Tensor, product: Product) -> Place:
    whole = view._base.shape if view._base is not None else view.shape
    n = len(whole)
    # an index into a gathered copy of the experts stands for any of them
    axes = {axis: _walk(view, (axis,), whole) for axis in range(view.ndim)}
    lead = {axis for one in product.lead_axes if one < view.ndim for axis in _moving(axes[one])}
    outs, ins = _walk(view, product.out_axes, whole), _walk(view, product.in_axes, whole)
    out_axes, in_axes = _moving(outs), _moving(ins)
    rest = [axis for axis in range(n) if axis not in out_axes and axis not in in_axes and axis not in lead]
    if not out_axes and rest:
        out_axes = [rest.pop(0)]
    if not in_axes and rest:
        in_axes = [rest.pop()]
    in_axes = sorted({*in_axes, *(axis for axis in rest if whole[axis] == 1)})
    fixed = [axis for axis in rest if whole[axis] > 1]
    if set(out_axes) & set(in_axes) or len(lead) + len(fixed) > 1 or (lead | set(fixed)) - {0}:
        return Place(name, reason="which of its axes are outputs could not be told")
    expert = None if not (lead or fixed) else -1 if lead else int(outs[0, 0])
    rows, columns = _ravel(outs, out_axes, whole), _ravel(ins, in_axes, whole)
    shift = 1 if expert is not None else 0
    return Place(
        name,
        tuple(axis - shift for axis in out_axes),
        tuple(axis - shift for axis in in_axes),
        rows,
        columns,
        expert,
    )


def _walk(view: Tensor, axes: tuple[int, ...], whole: torch.Size) -> Tensor:
    """Coordinates in the whole parameter of the view's entries along some axes, the others at 0: (entries, ndim)."""
    flat = torch.tensor([view.storage_offset()])
    for axis in axes:
        flat = (flat[:, None] + torch.arange(view.shape[axis]) * view.stride(axis)).flatten()
    return torch.stack(torch.unravel_index(flat, whole), -1)


def _moving(coordinates: Tensor) -> list[int]:
    return (coordinates != coordinates[:1]).any(0).nonzero().flatten().tolist()


def _ravel(coordinates: Tensor, axes: list[int], whole: torch.Size) -> Tensor | None:
    number = torch.zeros(len(coordinates), dtype=torch.long)
    size = 1
    for axis in axes:
        number = number * whole[axis] + coordinates[:, axis]
        size *= whole[axis]
    return None if torch.equal(number, torch.arange(size)) else number
