"""A reader of xformers' memory-efficient attention, from its documented signature.

Queries, keys and values are (batch, tokens, heads, width); with three dimensions there is one head, with five a group
of query heads beside each key head. `attn_bias` is a tensor that is added to the scores, or an object of a class that
can write itself out as one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.calls import KernelCall
from fullrank.capture.reading import Unreadable
from fullrank.operators.masks import Causal

__all__ = ["READERS"]

_LARGEST = 1 << 28
"""A bias object is written out where its map has no more entries than this."""


def _read(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> KernelCall:
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    q, k, v = (_heads_second(given[name].detach()) for name in ("query", "key", "value"))
    if q.ndim == 5:  # (batch, groups, heads of a group, tokens, width)
        q = q.flatten(1, 2)
        k, v = (_whole(x) for x in (k, v))
    bias, visible = given.get("attn_bias"), None
    if type(bias).__name__ == "LowerTriangularMask" and getattr(bias, "_subtensor", None) is None:
        bias, visible = None, Causal()
    elif bias is not None and not isinstance(bias, Tensor):
        bias = _written_out(bias, q.shape[-2], k.shape[-2], q)
    out = output[0] if isinstance(output, tuple) else output
    return KernelCall(
        kernel=getattr(function, "__name__", "memory_efficient_attention"),
        dtype=out.dtype,
        query=q,
        key=k,
        value=v,
        mask=_for_heads(bias, given["query"].ndim),
        visible=visible,
        scale=given.get("scale"),
    )


def _heads_second(x: Tensor) -> Tensor:
    if x.ndim == 3:
        return x.unsqueeze(1)
    return x.movedim(1, -2)  # (batch, tokens, [groups,] heads, width) → (batch, [groups,] heads, tokens, width)


def _whole(x: Tensor) -> Tensor:
    # an expanded axis holds one head for its whole group: it stays one
    return x[:, :, 0] if x.stride(2) == 0 or x.shape[2] == 1 else x.flatten(1, 2)


def _for_heads(bias: Tensor | None, dimensions: int) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.detach()
    if bias.ndim == 5:
        return bias.flatten(1, 2)
    return bias.unsqueeze(1) if dimensions == 3 and bias.ndim == 3 else bias


def _written_out(bias: Any, queries: int, keys: int, like: Tensor) -> Tensor:
    name = type(bias).__name__
    if queries * keys > _LARGEST:
        raise Unreadable(f"its {name} would be written out as {queries} × {keys} numbers")
    try:
        written = bias.materialize((1, 1, queries, keys), dtype=torch.float32, device=like.device)
    except (AttributeError, NotImplementedError, AssertionError, ValueError) as error:
        raise Unreadable(f"its {name} cannot be written out as a tensor") from error
    return written if isinstance(written, Tensor) else torch.as_tensor(written)


def _own(function: Callable[..., Any]) -> Any:
    return functools.partial(_read, function)


_PACKAGES = ("xformers.ops", "xformers.ops.fmha")
_FUNCTIONS = ("memory_efficient_attention", "memory_efficient_attention_forward")

READERS = {(package, name): _own for package in _PACKAGES for name in _FUNCTIONS}
"""By module and function: what makes a reader of the function that is found there."""
