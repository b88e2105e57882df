"""Metrics of an attention map written from their definitions with loops, in float64.

Each takes one map (queries, keys), its visibility of the same shape and the list of queries that count.
"""

import math

import torch


def _rows(visible, rows):
    return [t for t in rows if bool(visible[t].any())]


def _mean(values):
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def _seen(visible, t):
    return [s for s in range(visible.shape[1]) if visible[t, s]]


def _row_entropy(A, visible, t):
    return -sum(float(A[t, s]) * math.log(A[t, s]) for s in _seen(visible, t) if A[t, s] > 0)


def entropy(A, visible, rows):
    return _mean([_row_entropy(A, visible, t) for t in _rows(visible, rows)])


def normalized_entropy(A, visible, rows):
    rows = [t for t in _rows(visible, rows) if len(_seen(visible, t)) > 1]
    return _mean([_row_entropy(A, visible, t) / math.log(len(_seen(visible, t))) for t in rows])


def effective_keys(A, visible, rows):
    return _mean([math.exp(_row_entropy(A, visible, t)) for t in _rows(visible, rows)])


def inverse_participation(A, visible, rows):
    return _mean([sum(float(A[t, s]) ** 2 for s in _seen(visible, t)) for t in _rows(visible, rows)])


def column_mean(A, visible, rows):
    rows = _rows(visible, rows)
    return [sum(float(A[t, s]) for t in rows if visible[t, s]) / len(rows) for s in range(A.shape[1])]


def sink_mass(A, visible, rows):
    return max(column_mean(A, visible, rows))


def sink_position(A, visible, rows):
    mean = column_mean(A, visible, rows)
    return mean.index(max(mean))


def selectivity(A, visible, rows):
    """Rows of any sum r_t: the mean of KL(A_t/r_t ‖ c restricted and renormalised), each row with weight r_t."""
    c = column_mean(A, visible, rows)
    weighted, weights = 0.0, 0.0
    for t in _rows(visible, rows):
        seen = _seen(visible, t)
        r = sum(float(A[t, s]) for s in seen)
        Z = sum(c[s] for s in seen)
        weighted += r * sum(
            float(A[t, s]) / r * math.log((float(A[t, s]) / r) / (c[s] / Z)) for s in seen if A[t, s] > 0
        )
        weights += r
    return weighted / weights


def _row_std(S, visible, t):
    logits = [float(S[t, s]) for s in _seen(visible, t)]
    mean = sum(logits) / len(logits)
    return math.sqrt(sum((a - mean) ** 2 for a in logits) / len(logits))


def logit_std(S, visible, rows):
    return _mean([_row_std(S, visible, t) for t in _rows(visible, rows)])


def log_context_gauge(S, visible, rows):
    rows = [t for t in _rows(visible, rows) if len(_seen(visible, t)) > 1]
    return _mean([_row_std(S, visible, t) / math.sqrt(math.log(len(_seen(visible, t)))) for t in rows])


def max_logit(S, visible, rows):
    return max(float(S[t, s]) for t in _rows(visible, rows) for s in _seen(visible, t))


def _restricted(A, visible, rows):
    return torch.stack([torch.where(visible[t], A[t], 0.0) for t in _rows(visible, rows)])


def _uniform(A, visible, rows):
    out = torch.zeros(len(_rows(visible, rows)), A.shape[1], dtype=A.dtype)
    for i, t in enumerate(_rows(visible, rows)):
        seen = _seen(visible, t)
        for s in seen:
            out[i, s] = sum(float(A[t, u]) for u in seen) / len(seen)
    return out


def attention_s1(A, visible, rows):
    return float(torch.linalg.svdvals(_restricted(A, visible, rows))[0])


def attention_s2(A, visible, rows):
    return float(torch.linalg.svdvals(_restricted(A, visible, rows))[1])


def outlier_share(A, visible, rows):
    energy = torch.linalg.svdvals(_restricted(A, visible, rows)) ** 2
    return float(energy[0] / energy.sum())


def attention_stable_rank(A, visible, rows):
    return 1 / outlier_share(A, visible, rows)


def uniform_distance(A, visible, rows):
    apart = _restricted(A, visible, rows) - _uniform(A, visible, rows)
    return float(torch.linalg.svdvals(apart)[0])


def smoothing_gain(A, visible, rows):
    kept = _restricted(A, visible, rows)
    J = torch.full((len(kept), len(kept)), 1 / len(kept), dtype=kept.dtype)
    return float(torch.linalg.svdvals((torch.eye(len(kept), dtype=kept.dtype) - J) @ kept)[0])


def branch_energy(A, V, visible, rows):
    kept = _restricted(A, visible, rows)
    apart = (kept - _uniform(A, visible, rows)) @ V
    return float((apart**2).sum() / ((kept @ V) ** 2).sum())


def _apart(vectors):
    """Mean squared distance from the mean vector."""
    mean = sum(vectors) / len(vectors)
    return sum(float(((x - mean) ** 2).sum()) for x in vectors) / len(vectors)


def contrast_gain(A, V, visible, rows):
    used = [s for s in range(A.shape[1]) if any(bool(visible[t, s]) for t in range(A.shape[0]))]
    outputs = [sum(A[t, s] * V[s] for s in _seen(visible, t)) for t in _rows(visible, rows)]
    return math.sqrt(_apart(outputs) / _apart([V[s] for s in used]))
