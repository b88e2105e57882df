"""Finding tensors in what modules and functions are called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor

__all__ = ["first_state", "stream_input", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def stream_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream a block is called with: its first argument, `hidden_states`, or the first floating tensor."""
    if args and _is_state(args[0]):
        return args[0]
    named = kwargs.get("hidden_states")
    if _is_state(named):
        return named
    return next((item for item in (*args, *kwargs.values()) if _is_state(item)), None)


def first_state(output: Any) -> Tensor | None:
    """The residual stream a block returns: a tensor, or the first item of what it returns."""
    if _is_state(output):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        return first_state(output[0])
    return None


def _is_state(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
