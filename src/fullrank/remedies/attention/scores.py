"""The scores of an attention call and who sees whom, by blocks of queries: for what must look at the map itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fullrank.capture.reading import visible_in
from fullrank.edit import Call
from fullrank.errors import EditError

__all__ = [
    "Rows",
    "attended",
    "clear_of_sinks",
    "per_query_head",
    "row_blocks",
    "scores",
    "seen_in",
    "visible_numbers",
    "whole_mask",
]

Rows = slice | Tensor
"""Which queries: a run of them, or their numbers."""

_ENTRIES = 1 << 25
"""Scores that are held at once, over sequences and heads; 128 MB in float32."""


def seen_in(call: Call, rows: Rows = slice(None)) -> Tensor | None:
    """Which keys some queries see.

    Args:
        call: the call.
        rows: which queries.

    Returns:
        bool, broadcasts to (batch, heads, rows, keys); None where all see all.

    Raises:
        EditError: where the mask of the kernel is code.
    """
    if call.logits is not None:
        return visible_in(call.logits[..., rows, :])
    seen: Tensor | None = None
    if call.mask is not None:
        if not isinstance(call.mask, Tensor):
            raise EditError(f"which keys are visible in {call.place.path} is not known: its mask is code.")
        mask = _rows_of(call.mask, rows)
        seen = mask if mask.dtype == torch.bool else visible_in(mask)
    if call.causal or call.window is not None:
        t = torch.arange(call.queries, device=call.value.device)[rows][:, None]
        s = torch.arange(call.keys, device=call.value.device)
        band = s <= t if call.causal else torch.ones_like(s <= t)
        if call.window is not None:
            band = band & (s > t - call.window)
        seen = band[None, None] if seen is None else seen & band
    return seen


def visible_numbers(call: Call) -> Tensor:
    """How many keys each query sees; without a mask in O(T).

    Args:
        call: the call.

    Returns:
        float32 or wider, broadcasts to (batch, heads, queries, 1).
    """
    dtype = torch.promote_types(call.value.dtype, torch.float32)
    if call.logits is None and call.mask is None:
        n = torch.full((call.queries,), call.keys, device=call.value.device)
        if call.causal:
            n = torch.minimum(n, torch.arange(1, call.queries + 1, device=n.device))
        if call.window is None or (call.causal and call.queries <= call.keys):
            n = n if call.window is None else n.clamp(max=call.window)
            return n.to(dtype)[None, None, :, None]
    seen = seen_in(call)
    if seen is None:
        return torch.full((1, 1, 1, 1), call.keys, dtype=dtype, device=call.value.device)
    return seen.expand(*seen.shape[:-1], call.keys).sum(-1, keepdim=True).to(dtype)


def scores(
    call: Call, rows: Rows = slice(None), bend: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scores of some queries as they are softmaxed, s = bend(scale · QKᵀ) + bias; under autocast as without.

    Args:
        call: the call.
        rows: which queries.
        bend: acts on the scores before biases; on what a model that softmaxes by itself shows, with them.

    Returns:
        (batch, heads, rows, keys) in float32 or wider, very low where hidden; and what is visible, as by `seen_in`.
    """
    with torch.autocast(call.value.device.type, enabled=False):
        return _scores(call, rows, bend)


def _scores(call: Call, rows: Rows, bend: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor | None]:
    seen = seen_in(call, rows)
    if call.logits is not None:
        s = call.logits[..., rows, :]
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        s = s if bend is None else bend(s)
    else:
        assert call.query is not None
        assert call.key is not None
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        Q, K = call.query[..., rows, :].to(dtype), call.key.to(dtype)
        scale = Q.shape[-1] ** -0.5 if call.scale is None else call.scale
        s = scale * (Q @ per_query_head(K, Q.shape[1]).mT)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        s = s if bend is None else bend(s)
        for added in (call.bias, call.mask):
            if added is not None and added.dtype != torch.bool:
                s = s + _rows_of(added, rows).to(dtype)
    if seen is not None:
        s = s.masked_fill(~seen, torch.finfo(s.dtype).min / 4)
    return s, seen


def row_blocks(call: Call, entries: int = _ENTRIES) -> Iterator[slice]:
    """Runs of queries whose scores are at most so many numbers, and at least one query each."""
    heads = (call.query if call.query is not None else call.logits).shape[1]  # type: ignore[union-attr]
    size = max(1, entries // max(1, call.value.shape[0] * heads * call.keys))
    for start in range(0, call.queries, size):
        yield slice(start, min(start + size, call.queries))


def attended(call: Call, weigh: Callable[[Call, Rows], Tensor]) -> Tensor:
    """The output of a call whose map is computed here, by blocks of queries.

    A single block is computed as it is. Several are computed again in the backward pass: memory grows as T, not T².

    Args:
        call: the call.
        weigh: the map of some queries, (batch, heads, rows, keys).

    Returns:
        (batch, heads, queries, width of values), in the type of the values; products are in float32 at least.
    """
    blocks = list(row_blocks(call))
    if len(blocks) == 1:
        return _output(call, slice(None), weigh)
    made = [checkpoint(_output, call, rows, weigh, use_reentrant=False, preserve_rng_state=False) for rows in blocks]
    return torch.cat(made, -2)


def _output(call: Call, rows: Rows, weigh: Callable[[Call, Rows], Tensor]) -> Tensor:
    with torch.autocast(call.value.device.type, enabled=False):
        A, V = weigh(call, rows), call.value
        wide = torch.promote_types(V.dtype, torch.float32)
        output: Tensor = A.to(wide) @ per_query_head(V, A.shape[1]).to(wide)
        return output.to(V.dtype)


def whole_mask(call: Call) -> Tensor | None:
    """Mask, causality, window and bias in one tensor, as kernels take it: bool, or added to the scores."""
    if call.window is None:
        return call.additive()
    seen = seen_in(call)
    extra = [one for one in (call.bias, call.mask) if one is not None and one.dtype != torch.bool]
    if not extra or seen is None:
        return seen
    return sum(extra[1:], extra[0]).masked_fill(~seen, float("-inf"))


def clear_of_sinks(call: Call) -> None:
    """Refuse a kernel that adds a sink of its own: the map that is computed here would miss it.

    Raises:
        EditError: in that case.
    """
    if call.sink is not None:
        raise EditError(f"attention in {call.place.path} has sinks of its own; use attn_implementation='eager'.")


def per_query_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values, repeated for the query heads that share them."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def _rows_of(mask: Tensor, rows: Rows) -> Tensor:
    return mask[..., rows, :] if mask.shape[-2] > 1 else mask
