"""Attention and its statistics from their definitions: float64, one row at a time, nothing clever."""

import math

import torch


def scores(query, key, *, scale=None, bias=None, softcap=None):
    """The scaled, capped and biased products of every pair; query head h reads key head h // group."""
    query, key = query.double(), key.double()
    batch, heads, queries, width = query.shape
    group = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    S = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            S[b, h] = scale * query[b, h] @ key[b, h // group].T
    if softcap is not None:
        S = softcap * torch.tanh(S / softcap)
    if bias is not None:
        S = S + bias.double()
    return S


def attention(S, visible, sink=None):
    """Softmax over what is visible (and the sink); a row that sees nothing is zero."""
    A = torch.zeros_like(S)
    batch, heads, queries, _ = S.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                seen = visible[b, h, t]
                if not seen.any():
                    continue
                logits = S[b, h, t][seen]
                if sink is not None:
                    logits = torch.cat([logits, sink[h : h + 1].double()])
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                A[b, h, t, seen] = weights[: int(seen.sum())]
    return A


def row_statistics(S, A, visible, sink=None):
    """What a summary holds, row by row; NaN for a row that sees nothing."""
    names = (
        "log_sum_exp",
        "entropy",
        "inverse_participation",
        "max_logit",
        "logit_mean",
        "logit_std",
        "row_sum",
    )
    out = {name: torch.full(S.shape[:3], math.nan, dtype=torch.float64) for name in names}
    batch, heads, queries, _ = S.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                seen = visible[b, h, t]
                if not seen.any():
                    continue
                s, a = S[b, h, t][seen], A[b, h, t][seen]
                logits = s if sink is None else torch.cat([s, sink[h : h + 1].double()])
                positive = a[a > 0]
                found = {
                    "log_sum_exp": torch.logsumexp(logits, 0),
                    "entropy": -(positive * positive.log()).sum(),
                    "inverse_participation": (a * a).sum(),
                    "max_logit": s.max(),
                    "logit_mean": s.mean(),
                    "logit_std": ((s - s.mean()) ** 2).mean().sqrt(),
                    "row_sum": a.sum(),
                }
                for name, value in found.items():
                    out[name][b, h, t] = value
    return out


def column_mean(A, visible, rows):
    """Mean of those rows of A that are asked for, (batch, queries), and see a key."""
    batch, heads, _, keys = A.shape
    out = torch.full((batch, heads, keys), math.nan, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kept = visible[b, h].any(-1) & rows[b]
            if kept.any():
                out[b, h] = A[b, h][kept].mean(0)
    return out


def selectivity(A, visible):
    """Mean over rows of KL(A_t ‖ mean row, restricted to what t sees and renormalised)."""
    batch, heads, queries, _ = A.shape
    out = torch.zeros(batch, heads, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kept = visible[b, h].any(-1)
            average = A[b, h][kept].mean(0)
            total, rows = 0.0, 0
            for t in range(queries):
                seen = visible[b, h, t]
                if not seen.any():
                    continue
                p = A[b, h, t][seen]
                reference = average[seen] / average[seen].sum()
                p, reference = p[p > 0], reference[p > 0]
                total += float((p * (p / reference).log()).sum())
                rows += 1
            out[b, h] = total / rows
    return out
