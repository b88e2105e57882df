"""Running a part of a forward again, with other numbers: what the calls between two tensors make of one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.lineage import BLANK, WRITTEN, Node, Ref
from fullrank.capture.products import product_of
from fullrank.capture.reference import module_at
from fullrank.capture.tensors import tensors_in
from fullrank.spec.subject import device_of

__all__ = ["CannotReplay", "Replay", "between"]

_IN_PLACE = frozenset({"__iadd__", "__imul__", "__isub__", "__itruediv__", "__setitem__"})


class CannotReplay(Exception):  # noqa: N818 - a reason on its way to a sentence, never shown as an error
    """What a call needs is not known any more: an activation of another part of the model."""


class Replay:
    """Runs calls of a lineage again, from their functions and arguments.

    Parameters and buffers are those that the model holds now; small integer tensors that the model was given are known
    too, and whatever was computed from these alone (positions, rotary tables, masks). Activations are not.

    Args:
        model: whose forward was followed; it is in evaluation mode, without gradients.
        instead: what stands in the place of a parameter, given it; by default itself.
    """

    def __init__(self, model: nn.Module, *, instead: Callable[[Tensor], Tensor] | None = None) -> None:
        self._model, self._instead = model, instead
        self._device = device_of(model)
        self._values: dict[int, list[Tensor]] = {}

    def __call__(
        self, end: Ref, given: Mapping[Ref, Tensor], *, unknown: Callable[[Ref], Tensor] | None = None
    ) -> Tensor:
        """What a tensor would have been.

        Args:
            end: the tensor.
            given: what stands in the place of others.
            unknown: makes what is not known; by default that ends the replay.

        Returns:
            Its value.

        Raises:
            CannotReplay: where something on the way is not known.
        """
        start = {(ref.node.order, ref.index): value for ref, value in given.items()}
        if (end.node.order, end.index) in start:
            return start[end.node.order, end.index]
        made: dict[int, list[Tensor]] = {}

        def look(ref: Ref) -> Tensor:
            value = start.get((ref.node.order, ref.index))
            if value is not None:
                return value
            if ref.node.order in made:
                return made[ref.node.order][ref.index]
            try:
                return self.value(ref)
            except CannotReplay:
                if unknown is None:
                    raise
                return unknown(ref)

        for node in between(given, end):
            made[node.order] = _run(node, look, self._device)
        return look(end)

    def value(self, ref: Ref) -> Tensor:
        """What a tensor was that no activation went into.

        Args:
            ref: the tensor.

        Returns:
            Its value.

        Raises:
            CannotReplay: for an activation.
        """
        for node in _above(ref.node, self._values):
            self._values[node.order] = self._leaf(node) if not node.parents else _run(node, self._known, self._device)
        return self._known(ref)

    def _known(self, ref: Ref) -> Tensor:
        return self._values[ref.node.order][ref.index]

    def _leaf(self, node: Node) -> list[Tensor]:
        if node.name in ("parameter", "buffer"):
            path, _, name = node.tensor.rpartition(".")
            held = getattr(module_at(self._model, path), name, None)
            if not isinstance(held, Tensor) or held.is_meta:
                raise CannotReplay(f"{node.tensor} is away")
            held = held.detach()
            return [held if self._instead is None or node.name == "buffer" else self._instead(held)]
        if node.name == "given":
            if node.kept is None:
                raise CannotReplay("an activation")
            return [node.kept]
        return _run(node, self._known, self._device)  # made from nothing: a range of numbers


def between(given: Mapping[Ref, Any], end: Ref) -> list[Node]:
    """The calls through which some tensors enter another one, in order.

    Args:
        given: the tensors; calls that made them are left out.
        end: the other.

    Returns:
        The calls, the one that made `end` last; none where no way leads there.
    """
    starts = {(ref.node.order, ref.index) for ref in given}
    first = min((order for order, _ in starts), default=0)
    back: dict[int, Node] = {}
    waiting = [end]
    while waiting:
        ref = waiting.pop()
        node = ref.node
        if (node.order, ref.index) in starts or node.order in back or node.order < first:
            continue
        back[node.order] = node
        waiting.extend(node.parents)
    touched: set[int] = set()
    for order in sorted(back):
        if any((p.node.order, p.index) in starts or p.node.order in touched for p in back[order].parents):
            touched.add(order)
    return [back[order] for order in sorted(touched)]


def _above(node: Node, known: Mapping[int, Any]) -> list[Node]:
    found: dict[int, Node] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.order in found or current.order in known:
            continue
        if current.attention or (current.name != "embedding" and product_of(current) is not None):
            raise CannotReplay("an activation")
        found[current.order] = current
        waiting.extend(parent.node for parent in current.parents)
    return [found[order] for order in sorted(found)]


def _run(node: Node, look: Callable[[Ref], Tensor], device: torch.device) -> list[Tensor]:
    def arg(value: Any) -> Any:
        if isinstance(value, Ref):
            return look(value)
        if isinstance(value, tuple | list):
            kept = [arg(item) for item in value]
            return kept if isinstance(value, list) else tuple(kept)
        return value

    if node.name == "alias":
        return [look(node.parents[0])]
    if node.name == WRITTEN:
        base, value, size, stride, offset = node.args
        written = look(base).contiguous().clone()
        written.as_strided(size, stride, offset).copy_(look(value))
        return [written]
    if node.name in BLANK:
        if "fill" not in node.kwargs:
            raise CannotReplay(f"{node.name} is not known any more")
        return [torch.full(node.shapes[0], node.kwargs["fill"], dtype=node.kwargs["dtype"], device=device)]
    if node.function is None:
        raise CannotReplay(f"{node.name} was not seen")
    args, kwargs = [arg(value) for value in node.args], {name: arg(value) for name, value in node.kwargs.items()}
    in_place = node.name in _IN_PLACE or (node.name.endswith("_") and not node.name.startswith("__"))
    if (in_place or kwargs.get("inplace")) and args and isinstance(args[0], Tensor):
        args[0] = args[0].clone()
    try:
        with torch.no_grad():
            output = node.function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CannotReplay(f"{node.name} does not take other numbers ({str(error).splitlines()[0]})") from None
    return [args[0]] if node.name == "__setitem__" else list(tensors_in(output))
