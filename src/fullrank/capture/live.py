"""The tensors of an attention call that gradients flow through, and how their gradients are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Live", "Wire", "live_of_sdpa", "permuted", "same", "seen_through", "wires_of_reader"]


def same(gradient: Tensor) -> Tensor:
    """The gradient as it is."""
    return gradient


@dataclass(frozen=True, eq=False)
class Wire:
    """A tensor of the model's own computation.

    Attributes:
        tensor: with its history, so that a hook on it is called in a backward.
        arrange: brings its gradient into (…, tokens, width).
    """

    tensor: Tensor
    arrange: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True, eq=False)
class Live:
    """What an attention call was given and gave, undetached; None where that was not found.

    Held only while the call is handed on.

    Attributes:
        query: what becomes the rows of the scores.
        key: what becomes their columns.
        value: what the map multiplies.
        output: what that gives.
        reason: why something is missing.
    """

    query: Wire | None = None
    key: Wire | None = None
    value: Wire | None = None
    output: Wire | None = None
    reason: str = ""


def permuted(tensor: Tensor, order: tuple[int, ...]) -> Wire:
    """A tensor whose axes are taken in another order."""
    return Wire(tensor, lambda gradient: gradient.permute(order))


def live_of_sdpa(output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Live:
    """The tensors of one call of `F.scaled_dot_product_attention`."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return Live(Wire(given["query"]), Wire(given["key"]), Wire(given["value"]), Wire(output))


def wires_of_reader(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, given: Iterable[Tensor], returned: Iterable[Tensor]
) -> Live:
    """The tensors of a call that somebody else's reader described.

    A reader may hand on views; the model's own tensors are those whose memory it shows.

    Args:
        query: as the reader gave it, (…, queries, width).
        key: the same, (…, keys, width).
        value: the same, (…, keys, width of values).
        given: the tensors that the kernel was called with.
        returned: the tensors that it returned.

    Returns:
        What was found.
    """
    given = [tensor for tensor in given if tensor.is_floating_point()]
    wires: list[Wire | None] = []
    for view in (query, key, value):
        found = None
        for base in given if view is not None else ():
            arrange = seen_through(view, base) if view is not None else None
            if arrange is not None:
                found = Wire(base, arrange)
                break
        wires.append(found)
    output = None
    for tensor in returned if query is not None and wires[0] is not None else ():
        order = _order(query, wires[0].tensor) if query is not None and wires[0] is not None else None
        order = order or tuple(range(tensor.ndim))
        if query is not None and tensor.ndim == query.ndim == len(order) and tensor.requires_grad:
            rows = torch.Size(tensor.shape[axis] for axis in order)
            if rows[:-1] == query.shape[:-1]:
                output = permuted(tensor, order)
                break
    return Live(
        wires[0], wires[1], wires[2], output, reason="what its reader gave is not a view of what the kernel was given"
    )


def seen_through(view: Tensor, base: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How a gradient of `base` is read in the layout of `view`, or None where `view` does not lie in it.

    Args:
        view: a tensor that shares the memory of `base`, in any layout.
        base: the tensor that the gradient is of.

    Returns:
        A function of the gradient.
    """
    if view is base:
        return same
    if view.dtype != base.dtype or view.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    offset = view.storage_offset() - base.storage_offset()
    size, stride = tuple(view.shape), view.stride()
    base_size, base_stride = tuple(base.shape), base.stride()
    if offset == 0 and (size, stride) == (base_size, base_stride):
        return same
    span = _span(base_size, base_stride)
    if (
        offset < 0
        or offset + _span(size, stride) > span
        or 0 in (s for s, n in zip(base_stride, base_size, strict=True) if n > 1)
    ):
        return None

    def arrange(gradient: Tensor) -> Tensor:
        memory = gradient.new_zeros(span)
        memory.as_strided(base_size, base_stride).copy_(gradient)
        return memory.as_strided(size, stride, offset)

    return arrange


def _span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0


def _order(view: Tensor, base: Tensor) -> tuple[int, ...] | None:
    """The axes of `base` in the order of `view`, where that is all that differs."""
    axes = list(zip(base.shape, base.stride(), strict=True))
    if view.ndim != base.ndim:
        return None
    order: list[int] = []
    for axis in zip(view.shape, view.stride(), strict=True):
        found = next((i for i, other in enumerate(axes) if other == axis and i not in order), None)
        if found is None:
            return None
        order.append(found)
    return tuple(order)
