"""Batches that continue a key–value cache: one new token is enough to find the blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["without_past"]

_PAST = "past_key_values"


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
