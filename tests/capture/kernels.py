"""Stand-ins for kernels that cannot be installed here: their documented signatures, layouts and masks, written out."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale, visible, bias=None, softcap=0.0) -> Tensor:
    """(tokens, heads, width) of one sequence; `visible(i, j)` and `bias(head, i, j)` from the documentation's words."""
    heads, pairs = range(q.shape[1]), [[(i, j) for j in range(k.shape[0])] for i in range(q.shape[0])]
    seen = torch.tensor([[visible(i, j) for i, j in row] for row in pairs])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
    s = q.transpose(0, 1) @ k.mT * scale  # (heads, queries, keys)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if bias is not None:
        s = s + torch.tensor([[[float(bias(head, i, j)) for i, j in row] for row in pairs] for head in heads])
    e = torch.where(seen, (s - s.amax(-1, keepdim=True)).exp(), 0)
    total = e.sum(-1, keepdim=True)
    return torch.where(total > 0, e / total.clamp(min=1e-30), 0).matmul(v).transpose(0, 1)


def _flash(q, k, v, softmax_scale, causal, window_size, softcap, slopes):
    offset, (left, right) = k.shape[0] - q.shape[0], window_size

    def visible(i, j):
        at = i + offset
        return (not causal or j <= at) and (left < 0 or j >= at - left) and (right < 0 or j <= at + right)

    def bias(head, i, j):
        return -float(slopes[head]) * abs(i + offset - j)

    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    return attend(q, k, v, scale=scale, visible=visible, bias=None if slopes is None else bias, softcap=softcap)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    rows = []
    for b in range(q.shape[0]):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b]
        rows.append(_flash(q[b], k[b], v[b], softmax_scale, causal, window_size, softcap, slopes))
    out = torch.stack(rows)
    return (out, None, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    parts = []
    for b in range(len(cu_seqlens_q) - 1):
        mine, theirs = (slice(int(ends[b]), int(ends[b + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b]
        parts.append(_flash(q[mine], k[theirs], v[theirs], softmax_scale, causal, window_size, softcap, slopes))
    return torch.cat(parts)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return flash_attn_func(
        *qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return flash_attn_func(
        q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    q, k, v = qkv.unbind(1)
    ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *ends, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None, causal=False):
    k_cache[:, -q.shape[1] :] = k
    v_cache[:, -q.shape[1] :] = v
    return flash_attn_func(q, k_cache, v_cache, 0.0, softmax_scale, causal)


# ---------------------------------------------------------------- xformers


class AttentionBias:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        raise NotImplementedError


class LowerTriangularMask(AttentionBias):
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, -math.inf, dtype=dtype, device=device).triu(1)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return super().materialize(shape, dtype, device) + self._bias


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqlen: list[int]
    kv_seqlen: list[int]
    causal: bool = False

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        mask = torch.full(shape[-2:], -math.inf, dtype=dtype)
        row = column = 0
        for queries, keys in zip(self.q_seqlen, self.kv_seqlen, strict=True):
            block = torch.zeros(queries, keys)
            if self.causal:
                block = torch.full((queries, keys), -math.inf).triu(1)
            mask[row : row + queries, column : column + keys] = block
            row, column = row + queries, column + keys
        assert (row, column) == tuple(shape[-2:])
        return mask.expand(shape)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    if query.ndim == 3:
        bias = attn_bias.unsqueeze(1) if isinstance(attn_bias, Tensor) else attn_bias
        parts = (x.unsqueeze(2) for x in (query, key, value))
        return memory_efficient_attention(*parts, attn_bias=bias, p=p, scale=scale).squeeze(2)
    if query.ndim == 5:
        bias = attn_bias.flatten(1, 2) if isinstance(attn_bias, Tensor) else attn_bias
        parts = (x.flatten(2, 3) for x in (query, key, value))
        return memory_efficient_attention(*parts, attn_bias=bias, p=p, scale=scale).view_as(query)
    batch, queries, heads, width = query.shape
    shape = (batch, heads, queries, key.shape[1])
    added = torch.zeros(shape)
    if isinstance(attn_bias, Tensor):
        added = attn_bias.expand(shape)
    elif attn_bias is not None:
        added = attn_bias.materialize(shape)
    factor = 1 / math.sqrt(width) if scale is None else scale
    rows = [
        attend(
            query[b],
            key[b],
            value[b],
            scale=factor,
            visible=lambda i, j: True,
            bias=lambda h, i, j, b=b: added[b, h, i, j],
        )
        for b in range(batch)
    ]
    return torch.stack(rows)


def module_of(name: str, *members: object) -> types.ModuleType:
    module = types.ModuleType(name)
    for member in members:
        setattr(module, member.__name__, member)
    return module


FLASH = (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_qkvpacked_func,
    flash_attn_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
XFORMERS = (memory_efficient_attention, LowerTriangularMask, LowerTriangularMaskWithTensorBias, BlockDiagonalMask)
