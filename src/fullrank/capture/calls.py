"""One call of an attention kernel as it was seen, before it is brought into a common form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.capture.live import Live
from fullrank.operators.masks import Mask

__all__ = ["KernelCall", "from_sdpa", "shapes_only"]


@dataclass(frozen=True, eq=False)
class KernelCall:
    """What a kernel was given, in the conventions of `F.scaled_dot_product_attention`, or the weights a model made.

    Attributes:
        kernel: what was called.
        value: (…, keys, width), or None where it is not known.
        dtype: the kernel computes in it.
        sources: what the values were computed from, as bits of `Marks`; a reader of one's own leaves it out.
        query: (…, queries, width).
        key: (…, keys, width).
        mask: True where visible, or what is added to the scores.
        causal: the kernel's own flag.
        visible: who is visible, beside `mask` and `causal`, where no tensor says it.
        bias: what is added to the scores, beside `mask`, as a function of a range of queries and of keys.
        real: (batch, queries) and (batch, keys) bool, which are tokens, where the kernel was told.
        unknown: why the map of the call cannot be known, though it is attention; empty where it can.
        scale: of the scores; None for 1/√width.
        softcap: scores become softcap · tanh(scores / softcap).
        sink: (heads,) learned logits that take part in the softmax and are dropped.
        weights: (…, queries, keys) where the model made the map itself; then there are no query and key.
        logits: (…, queries, keys), what was softmaxed to give `weights`.
        sink_column: whether a last column of the softmax was dropped before the values.
        heads: number of heads folded into the leading axis, where the caller said so.
        live: the model's own tensors of this call, where gradients are wanted.
    """

    kernel: str
    value: Tensor | None
    dtype: torch.dtype
    sources: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None
    sink_column: bool = False
    heads: int | None = None
    live: Live | None = None
    visible: Mask | None = None
    bias: Callable[[slice, slice], Tensor] | None = None
    real: tuple[Tensor, Tensor] | None = None
    unknown: str = ""


def shapes_only(call: KernelCall) -> KernelCall:
    """The call with tensors without storage in place of the real ones: whoever keeps it keeps no memory."""
    kept: dict[str, Any] = {}
    for name in ("query", "key", "value", "weights"):
        tensor = getattr(call, name)
        kept[name] = None if tensor is None else torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
    rest: dict[str, Any] = dict.fromkeys(("logits", "mask", "sink", "live", "visible", "bias", "real"))
    return replace(call, **kept, **rest)


def from_sdpa(
    output: Tensor, sources: int, heads: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> KernelCall:
    """Read the arguments of one call of `F.scaled_dot_product_attention`.

    Returns:
        The call. Under autocast its tensors are cast as the kernel casts them: the output tells to what.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (_as(given[name], output.dtype) for name in names[:3])
    if query.ndim > 2 and query.shape[:-2] != output.shape[:-2]:
        query = query.expand(*output.shape[:-1], query.shape[-1])  # learned queries with batch 1
    return KernelCall(
        kernel=functional.scaled_dot_product_attention.__name__,
        value=value,
        sources=sources,
        dtype=output.dtype,
        query=query,
        key=key,
        mask=given.get("attn_mask"),
        causal=bool(given.get("is_causal", False)),
        scale=given.get("scale"),
        heads=heads,
    )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach() if tensor.dtype == dtype else tensor.detach().to(dtype)
