"""Readers of flash-attention's functions, from their documented signatures.

Queries, keys and values are (batch, tokens, heads, width), or (all tokens, heads, width) of sequences laid end to end
with the cumulative lengths beside them. A causal map or a window is aligned to the bottom right: query i of T stands at
the position i + S − T of S keys. `window_size` (l, r) shows keys from i + S − T − l to i + S − T + r, −1 being without
end; `alibi_slopes` add −slope · |i + S − T − j|.
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
from fullrank.operators.masks import Causal, Full, Intervals, Mask, Packed, Padding, SlidingWindow

__all__ = ["READERS", "read_dispatched", "windowed"]

_UNREAD = {
    "qv": "its scores have a second part, qv",
    "attention_chunk": "it attends by chunks",
    "block_table": "its keys are in pages",
    "page_table": "its keys are in pages",
    "seqused_q": "not all of its queries are used",
    "seqused_k": "not all of its keys are used",
    "q_descale": "its queries are scaled numbers of eight bits",
    "score_mod": "its scores are code",
    "mask_mod": "its mask is code",
}


def windowed(queries: int, keys: int, *, causal: bool, window: tuple[int, int] = (-1, -1)) -> Mask:
    """The mask of a causal flag and a window, aligned to the bottom right.

    Args:
        queries: T.
        keys: S.
        causal: whether no later key is seen.
        window: keys seen to the left and to the right of the query's position; −1 for all.

    Returns:
        The mask.
    """
    left, right = window
    right = 0 if causal else right
    offset = keys - queries
    if left < 0 and right < 0:
        return Full()
    if left < 0 and right == 0:
        return Causal(offset)
    if left >= 0 and right == 0:
        return SlidingWindow(left + 1, causal=True, offset=offset)
    if left == right:
        return SlidingWindow(left + 1, causal=False, offset=offset)
    at = torch.arange(queries)[None] + offset
    first = torch.zeros_like(at) if left < 0 else at - left
    stop = torch.full_like(at, keys) if right < 0 else at + right + 1
    return Intervals(first.clamp(0, keys), stop.clamp(0, keys))


# ---------------------------------------------------------------- the package's own functions


def _read(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> KernelCall:
    # positions differ between versions, names do not
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    for name, reason in _UNREAD.items():
        value = given.get(name)
        if isinstance(value, Tensor) or value:
            raise Unreadable(reason)
    q, k, v = _unpacked(given)
    out = output[0] if isinstance(output, tuple) else output
    options = {
        "kernel": getattr(function, "__name__", "flash attention"),
        "dtype": out.dtype,
        "scale": given.get("softmax_scale"),
        "softcap": given.get("softcap") or None,
        "sink": given.get("learnable_sink", given.get("s_aux")),
    }
    window, causal = _window(given.get("window_size")), bool(given.get("causal", False))
    slopes = given.get("alibi_slopes")
    of_queries = given.get("cu_seqlens_q", given.get("cu_seqlens"))
    if of_queries is not None:
        of_keys = given.get("cu_seqlens_k", of_queries)
        return _laid_end_to_end(q, k, v, of_queries, of_keys, causal=causal, window=window, slopes=slopes, **options)
    queries, keys = q.shape[1], k.shape[1]
    bias = None if slopes is None else _alibi(slopes, torch.tensor([keys - queries], device=q.device))
    return KernelCall(
        query=q.detach().transpose(1, 2),
        key=k.detach().transpose(1, 2),
        value=v.detach().transpose(1, 2),
        visible=windowed(queries, keys, causal=causal, window=window),
        bias=bias,
        **options,
    )


def _unpacked(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if "qkv" in given:
        q, k, v = given["qkv"].unbind(-3)
        return q, k, v
    if "kv" in given:
        k, v = given["kv"].unbind(-3)
        return given["q"], k, v
    return given["q"], given["k"], given["v"]


def _window(given: Any) -> tuple[int, int]:
    left, right = (-1, -1) if given is None else given
    return (-1 if left is None else int(left)), (-1 if right is None else int(right))


def _alibi(slopes: Tensor, offset: Tensor) -> Callable[[slice, slice], Tensor]:
    """−slope · |i + offset − j| for a range of queries and of keys, (batch, heads, queries, keys)."""
    slopes = slopes.detach().float().reshape(-1, slopes.shape[-1])[:, :, None, None]

    def bias(queries: slice, keys: slice) -> Tensor:
        i = torch.arange(queries.start, queries.stop, device=slopes.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=slopes.device)
        return -slopes * (i + offset[:, None, None, None] - j).abs()

    return bias


def _laid_end_to_end(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    *,
    causal: bool,
    window: tuple[int, int],
    slopes: Tensor | None,
    **options: Any,
) -> KernelCall:
    """One sequence to a row again, each padded at its end to the longest."""
    (query, real_queries), (key, real_keys), (value, _) = (
        _rows(x.detach(), ends) for x, ends in ((q, of_queries), (k, of_keys), (v, of_keys))
    )
    lengths = real_keys.sum(-1)  # (sequences,)
    offset = lengths - real_queries.sum(-1)
    at = torch.arange(query.shape[1], device=q.device) + offset[:, None]
    left, right = window[0], 0 if causal else window[1]
    first = torch.zeros_like(at) if left < 0 else (at - left).clamp(min=0)
    stop = lengths[:, None].expand_as(at) if right < 0 else torch.minimum(at + right + 1, lengths[:, None])
    stop = torch.where(real_queries, stop, 0).clamp(min=0)
    return KernelCall(
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        visible=Intervals(torch.minimum(first, stop), stop, is_causal=causal),
        bias=None if slopes is None else _alibi(slopes, offset),
        real=(real_queries, real_keys),
        **options,
    )


def _rows(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(all tokens, heads, width) as (sequences, longest, heads, width), and which of these are tokens."""
    starts, lengths = ends[:-1].long(), (ends[1:] - ends[:-1]).long()
    place = torch.arange(int(lengths.max()), device=x.device)
    real = place < lengths[:, None]
    index = (starts[:, None] + place).clamp(max=x.shape[0] - 1)
    return torch.where(real[..., None, None], x[index], 0), real


def _refused(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> KernelCall:
    raise Unreadable("it writes new keys into a cache and reads all of them from there")


# ---------------------------------------------------------------- the function that Hugging Face dispatches to


def read_dispatched(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> KernelCall:
    """Read one call of a `flash_attention_…` entry of the Hugging Face attention interface.

    It is given (batch, heads, tokens, width), a padding mask of two dimensions, and causality and window as numbers;
    documents packed into one row are told by restarting positions or by cumulative lengths.

    Args:
        args: module, query, key, value, mask.
        kwargs: everything else.
        output: what it returned.

    Returns:
        The call.

    Raises:
        Unreadable: for a cache in pages.
    """
    names = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "sliding_window", "softcap")
    given = dict(zip((*names, "is_causal", "s_aux"), args, strict=False)) | kwargs
    if given.get("block_table") is not None or given.get("cache") is not None:
        raise Unreadable(_UNREAD["block_table"])
    query, key = given["query"], given["key"]
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    told = given.get("is_causal")
    causal = bool(getattr(given["module"], "is_causal", False) if told is None else told) and queries > 1
    width = given.get("sliding_window")
    window = (-1, -1) if width is None or keys <= width else (width - 1, width - 1)
    visible = windowed(queries, keys, causal=causal, window=window)
    real = None
    padding = given.get("attention_mask")
    if padding is not None and padding.ndim == 2:
        real_keys = padding.bool()[:, -keys:]
        real = (real_keys[:, -queries:], real_keys)
        visible = visible & Padding(real_keys)
    elif (documents := _documents(given, batch, queries)) is not None:
        visible = visible & Packed(documents)
    out = output[0] if isinstance(output, tuple) else output
    return KernelCall(
        kernel="flash attention",
        dtype=out.dtype,
        query=query.detach(),
        key=key.detach(),
        value=given["value"].detach(),
        visible=visible,
        scale=given.get("scaling"),
        softcap=given.get("softcap"),
        sink=given.get("s_aux"),
        real=real,
    )


def _documents(given: dict[str, Any], batch: int, tokens: int) -> Tensor | None:
    ends = given.get("cu_seq_lens_q")
    if ends is not None and batch == 1:
        at = torch.arange(tokens, device=ends.device)
        return torch.bucketize(at, ends[1:].to(at.dtype), right=True)[None]
    positions = given.get("position_ids")
    if positions is None or batch != 1 or positions.ndim != 2 or positions.shape[1] != tokens or tokens == 1:
        return None
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.cumsum(-1)


def _own(read: Callable[..., KernelCall]) -> Callable[[Callable[..., Any]], Any]:
    return lambda function: functools.partial(read, function)


_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn.flash_attn_interface", "flash_attn.cute")
_FUNCTIONS = {
    "flash_attn_func": _read,
    "flash_attn_qkvpacked_func": _read,
    "flash_attn_kvpacked_func": _read,
    "flash_attn_varlen_func": _read,
    "flash_attn_varlen_qkvpacked_func": _read,
    "flash_attn_varlen_kvpacked_func": _read,
    "flash_attn_with_kvcache": _refused,
}

READERS = {(package, name): _own(read) for package in _PACKAGES for name, read in _FUNCTIONS.items()}
"""By module and function: what makes a reader of the function that is found there."""
