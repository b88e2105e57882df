"""Interventions on attention by definition: dense, one sequence, head and query at a time, in numpy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Twin:
    """Stands in for `F.scaled_dot_product_attention` and changes what one of its calls gives.

    Args:
        kind: of intervention.
        call: which call of the forward, from 0.
        heads: which are changed; all where empty.
        real: for each sequence the indices of its real queries, and of its real keys.
        causal: whether means run along.
        position: of the key to be hidden.
        cross: whether queries and keys are different tokens.
        factors: by head, by what the heads that stay are multiplied; the other ones of `heads` are dropped.

    `handed` is what the heads of that call hand to W_O: (batch, heads, queries, width), before the change.
    """

    def __init__(self, kind, call, heads, real, *, causal=False, position=0, cross=False, factors=None):
        self.kind, self.call, self.heads = kind, call, heads
        self.real, self.causal, self.position, self.cross = real, causal, position, cross
        self.factors, self.handed = factors or {}, None
        self.seen = 0

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **ignored):
        mine = self.seen == self.call
        self.seen += 1
        lead, T, S = query.shape[:-2], query.shape[-2], key.shape[-2]
        mask = None if attn_mask is None else attn_mask.expand(*lead, T, S).numpy()
        Q, K, V = (x.numpy() for x in (query, key, value))
        groups = Q.shape[1] // K.shape[1]
        out = np.zeros((*lead, T, V.shape[-1]))
        whole = out.copy()
        for b in range(lead[0]):
            queries, keys = (range(T), range(S)) if self.real is None else self.real[b]
            for h in range(lead[1]):
                s = Q[b, h] @ K[b, h // groups].T * (1 / math.sqrt(Q.shape[-1]) if scale is None else scale)
                see = np.ones((T, S), bool)
                if is_causal:
                    see = np.tril(see)
                if mask is not None and mask.dtype == bool:
                    see &= mask[b, h]
                elif mask is not None:
                    see &= mask[b, h] > -1e9
                    s = s + np.where(see, mask[b, h], 0)
                chosen = mine and (not self.heads or h in self.heads)
                if chosen and self.kind == "mask-sink" and self.position < len(keys):
                    k = list(keys)[self.position]
                    for t in range(T):
                        if (self.cross or t != k) and see[t].sum() > see[t, k]:
                            see[t, k] = False
                A = np.zeros((T, S))
                for t in range(T):
                    if see[t].any():
                        e = np.where(see[t], np.exp(s[t] - s[t][see[t]].max()), 0)
                        A[t] = e / e.sum()
                v = V[b, h // groups]
                y = whole[b, h] = A @ v
                if chosen and self.kind == "merge-heads":
                    y = y * self.factors.get(h, 0)
                elif chosen:
                    y = self.changed(y, A, v, see, list(queries), list(keys))
                out[b, h] = y
        if mine:
            self.handed = whole
        return torch.from_numpy(out)

    def changed(self, y: np.ndarray, A: np.ndarray, v: np.ndarray, see: np.ndarray, queries: list, keys: list):
        if self.kind == "zero-head":
            return y * 0
        new = y.copy()
        if self.kind == "mean-head":
            for t in queries:
                new[t] = np.mean([y[i] for i in queries if i <= t or not self.causal], 0)
        if self.kind == "deflate-attention":
            U, s, Vh = np.linalg.svd(A[np.ix_(queries, keys)])
            for i, t in enumerate(queries):
                for j, k in enumerate(keys):
                    if see[t, k]:
                        new[t] -= s[0] * U[i, 0] * Vh[0, j] * v[k]
        return new


def indices(real: Tensor | None, keys: Tensor | None = None):
    """For each sequence the indices of its real queries and keys."""
    if real is None:
        return None
    keys = real if keys is None else keys
    return [
        (q.nonzero()[:, 0].tolist(), k.nonzero()[:, 0].tolist()) for q, k in zip(real.bool(), keys.bool(), strict=True)
    ]
