"""Batches that continue a key–value cache: it is not grown, and one new token is enough to find the blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["own_copy", "without_past"]

_PAST = "past_key_values"


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


def without_past(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call as a prefill of a few tokens: what the survey runs where the batch has one token and a cache.

    One query sees every key there is, so that its map does not tell a decoder from an encoder, and what comes from a
    cache does not tell whose keys they are. Only shapes and visibility of this forward are looked at, no number.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        Both, without the cache, the one token of every tensor repeated.
    """
    kept = {name: value for name, value in kwargs.items() if name not in (_PAST, "cache_position")}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(map(_repeated, args)), {name: _repeated(value) for name, value in kept.items()}


def _repeated(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    tokens = 3 if value.shape[0] == 2 else 2  # as many tokens as sequences could not be told apart
    if value.shape[1] == 1:
        return value.expand(-1, tokens, *value.shape[2:])
    covers_the_past = value.ndim == 2 and not value.is_floating_point()  # a mask over earlier tokens too
    return value[:, -tokens:] if covers_the_past else value


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
