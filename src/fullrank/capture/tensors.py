"""Finding tensors in what modules and functions are called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor

__all__ = ["first_state", "is_handed_on", "place_of", "stream_input", "tensors_in"]


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


def is_handed_on(returned: Tensor | None, given: Tensor | None) -> bool:
    """Whether what a block is given is what was returned before: the same tensor, or, under sharding, a view of it all.

    Args:
        returned: still held, so that its memory is nobody else's.
        given: to the next block.

    Returns:
        Whether both are the same numbers.
    """
    if returned is None or given is None:
        return False
    if returned is given:
        return True
    layout = (returned.shape, returned.stride(), returned.dtype, returned.device)
    same = layout == (given.shape, given.stride(), given.dtype, given.device)
    return same and not given.is_meta and returned.data_ptr() == given.data_ptr()


def place_of(tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """At which place or under which name a tensor is passed; None where it is not."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next((place for place, item in places if item is tensor), None)


def stream_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int | str | None = None) -> Tensor | None:
    """The residual stream a block is called with: its first argument, `hidden_states`, or the first floating tensor.

    Args:
        args: of the call.
        kwargs: of the call.
        at: the place or the name under which it is passed, where that is known.

    Returns:
        The stream, or None where there is no such tensor.
    """
    named = args[at] if isinstance(at, int) and at < len(args) else kwargs.get(at) if isinstance(at, str) else None
    if _is_state(named):
        return named
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
