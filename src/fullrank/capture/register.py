"""Kernels that are not known here: a user says how to read their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fullrank.capture.calls import KernelCall
from fullrank.errors import CaptureError

__all__ = ["Reader", "Registration", "reader_of", "register_attention", "registered"]

Reader = Callable[[tuple[Any, ...], dict[str, Any], Any], KernelCall | None]
"""Called with the positional and keyword arguments of a call and what it returned; None for a call that is not
attention."""

_READERS: dict[Any, Reader] = {}


class Registration:
    """Undoes one `register_attention`, by `remove()` or at the end of a `with` block."""

    def __init__(self, function: Any, before: Reader | None) -> None:
        self._function = function
        self._before = before

    def remove(self) -> None:
        """Put back what was known of the function before."""
        if self._before is None:
            _READERS.pop(self._function, None)
        else:
            _READERS[self._function] = self._before

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register_attention(function: Any, reader: Reader) -> Registration:
    """Name a kernel, so that its calls are seen.

    Args:
        function: a torch function or custom operator (`torch.ops.mine.attention` or its overload), a function
            registered in the attention interface of Hugging Face, or a plain Python function that some loaded module
            holds under its name, as those do that import it.
        reader: makes a `KernelCall` of a call's arguments and output. It must not change them.

    Returns:
        A handle whose `remove()` forgets the kernel again.

    Raises:
        CaptureError: where one of the two cannot be called.
    """
    for name, given in (("function", function), ("reader", reader)):
        if not callable(given):
            raise CaptureError(
                f"{name}={given!r} cannot be called; pass the kernel and a function that reads its calls."
            )
    function = getattr(function, "_opoverload", function)  # what a decorator of torch.library leaves
    before = _READERS.get(function)
    _READERS[function] = reader
    return Registration(function, before)


def registered() -> list[tuple[Any, Reader]]:
    """All functions that were named, with their readers."""
    return list(_READERS.items())


def reader_of(function: Any) -> Reader | None:
    """How to read a function's calls, or None."""
    if not _READERS:
        return None
    try:
        found = _READERS.get(function)
    except TypeError:  # not every callable can be a key
        return None
    if found is None and isinstance(function, torch._ops.OpOverload):
        return _READERS.get(function.overloadpacket)
    if found is None and isinstance(function, torch._ops.OpOverloadPacket):
        overloads = (getattr(function, name) for name in function.overloads())
        return next((_READERS[one] for one in overloads if one in _READERS), None)
    return found
