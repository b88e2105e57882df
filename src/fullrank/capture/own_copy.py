"""What a forward may write into is copied before a forward of our own: a key–value cache is not grown."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["own_copy"]


def own_copy(value: Any) -> Any:
    """What a forward may write into, copied; anything else as it is.

    A cache grows in place. Tensors, numbers, texts, tuples and mappings of them are not written into by a forward; an
    object of another class that holds tensors may be, and every forward gets its own. Cost: the memory of the cache
    once more, while the forward runs.

    Args:
        value: an argument of the model.

    Returns:
        A copy that shares no tensor with the original, or the argument itself.
    """
    if isinstance(value, Tensor | Mapping | nn.Module) or type(value).__module__ == "builtins":
        return value
    held = {id(tensor): tensor for tensor in _tensors(value, set())}
    if not held:
        return value
    # copied here: deepcopy refuses tensors that autograd has made
    memo: dict[int, Any] = {key: tensor.detach().clone() for key, tensor in held.items()}
    return copy.deepcopy(value, memo)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        yield from _tensors(vars(value), seen)
