"""What a tensor was computed from, followed through the functions of a forward."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor

from fullrank.capture.tensors import tensors_in

__all__ = ["OUTSIDE", "Marks", "bit_of"]

OUTSIDE = 1
"""The source of what a block is called with beside its stream, such as the states of an encoder."""


def bit_of(stack: int) -> int:
    """The source that a stack's stream is, by the place of the stack."""
    return OUTSIDE << (stack + 1)


class Marks:
    """Sets of sources, as bits, on tensor objects that are not kept alive by it.

    Whether a call attends to its own stack's stream or to something else follows from whether the values were computed
    from that stream; no module name and no shape is asked.
    """

    def __init__(self) -> None:
        self._bits: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def of(self, tensor: Tensor | None) -> int:
        """The sources of a tensor; 0 where none is known."""
        if tensor is None:
            return 0
        found = self._bits.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else 0

    def add(self, tensor: Tensor, bits: int) -> None:
        """Add sources to a tensor."""
        bits |= self.of(tensor)
        key = id(tensor)
        if bits:
            self._bits[key] = (weakref.ref(tensor, partial(self._forget, key)), bits)

    def enter(self, stream: Tensor, bits: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called with a stream and other tensors."""
        for tensor in (*tensors_in(args), *tensors_in(kwargs)):
            if tensor is not stream and tensor.is_floating_point():
                self.add(tensor, OUTSIDE)
        self.add(stream, bits)

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What a function returns has the sources of all it was given; so has what it wrote into."""
        if not self._bits:
            return
        bits = 0
        for tensor in tensors_in(args):
            bits |= self.of(tensor)
        if kwargs:
            for tensor in tensors_in(kwargs):
                bits |= self.of(tensor)
        if not bits:
            return
        for tensor in tensors_in(output):
            self.add(tensor, bits)
        if output is None and args and isinstance(args[0], Tensor):  # __setitem__ and its like
            self.add(args[0], bits)

    def clear(self) -> None:
        """Forget everything: a new forward begins."""
        self._bits.clear()

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        found = self._bits.get(key)
        if found is not None and found[0] is dead:
            del self._bits[key]
