"""Giving back, between events, the memory that measuring has freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Self

from fullrank.capture.events import Event, Signal
from fullrank.table import Row

__all__ = ["FreedMemory"]

_ALL: frozenset[Signal] = frozenset({"stream", "mid", "read", "attention"})
_EVERY_BYTES = 1 << 20  # states smaller than this leave nothing worth giving back


class FreedMemory:
    """An observer that measures nothing: it asks the C library to return freed pages to the system.

    glibc keeps what is freed. Measuring frees many blocks of many sizes in between the model's own, and the holes that
    are left cannot always be used again: without this a process that examined GPT-2 at 4096 tokens took several times
    the memory that its tensors needed (with it: `benchmarks/examine.md`). Elsewhere than on the CPU under glibc it does
    nothing.

    Args:
        needs: after which events: those of the observer before it, since others free nothing.
    """

    def __init__(self, needs: frozenset[Signal] = _ALL) -> None:
        self.needs = needs

    def see(self, event: Event) -> None:
        """Give back what was freed while the event was reduced."""
        tensor = getattr(event, "value", None)
        if tensor is not None and tensor.device.type == "cpu" and tensor.nbytes >= _EVERY_BYTES:
            _trim()(0)

    def rows(self) -> list[Row]:
        """None: nothing is measured."""
        return []

    def merge(self, other: Self) -> None:
        """Nothing is merged."""


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc, or no dynamic loading of the process itself
        return lambda pad: 0
    return function
