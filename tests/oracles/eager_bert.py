"""Every number of a BERT encoder from eager attention maps and plain hooks, in numpy float64, one sequence at a time.

Shares no code with the package: definitions are written out again.
"""

import math

import numpy as np
import torch
from transformers import AutoModel


def collect(path, batch):
    """Stream states, attention maps, scores and values of a model in eager mode, as numpy arrays."""
    model = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    states, projections, handles = [], {}, []
    layers = model.encoder.layer
    handles.append(layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0])))
    for index, layer in enumerate(layers):
        handles.append(
            layer.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
        attention = layer.attention.self
        for role in ("query", "key", "value"):
            hook = lambda m, a, out, role=role, index=index: projections.__setitem__((index, role), out)  # noqa: E731
            handles.append(getattr(attention, role).register_forward_hook(hook))
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
    for handle in handles:
        handle.remove()
    heads = model.config.num_attention_heads
    maps = [attention.double().numpy() for attention in outputs.attentions]

    def split(tensor):
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2).double().numpy()

    roles = [
        {role: split(projections[index, role]) for role in ("query", "key", "value")} for index in range(len(layers))
    ]
    return [state.double().numpy() for state in states], maps, roles


def _cosines(X):
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    return unit @ unit.T


def _entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def token_numbers(X, previous=None):
    """Stream metrics of one sequence's real tokens, X (tokens, width)."""
    T, d = X.shape
    C = _cosines(X)
    centred = X - X.mean(0)
    numbers = {
        "rms": math.sqrt((X**2).mean()),
        "similarity": (C.sum() - np.trace(C)) / (T * (T - 1)),
        "residual": np.linalg.norm(centred) / np.linalg.norm(X),
        "max_to_median": np.abs(X).max() / np.sort(np.abs(X), axis=None)[(X.size - 1) // 2],  # the lower median
    }
    for prefix, Y in (("", X), ("centered_", centred)):
        s = np.linalg.svd(Y, compute_uv=False)
        numbers |= {
            prefix + "stable_rank": (s**2).sum() / s[0] ** 2,
            prefix + "gram_stable_rank": (s**4).sum() / s[0] ** 4,
            prefix + "effective_rank": math.exp(_entropy(s / s.sum())),
            prefix + "spectral_entropy_rank": math.exp(_entropy(s**2 / (s**2).sum())),
            prefix + "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
            prefix + "soft_rank": float((s**2 >= 0.5 * (s**2).sum() / d).sum()),
        }
    if previous is not None:
        numbers["update_share"] = np.linalg.norm(X - previous) / np.linalg.norm(previous)
        numbers["neighbour_cosine"] = (X * previous).sum() / np.linalg.norm(X) / np.linalg.norm(previous)
    return numbers


def batch_numbers(sequences):
    """Energy shares and similarity across sequences; `sequences` is a list of (tokens, width)."""
    everything = np.concatenate(sequences)
    total = (everything**2).sum()
    mean = everything.mean(0)
    shared = len(everything) * (mean**2).sum()
    within = sum(len(X) * ((X.mean(0) - mean) ** 2).sum() for X in sequences)
    own = sum(((X - X.mean(0)) ** 2).sum() for X in sequences)
    cosines = _cosines(everything)
    label = np.repeat(np.arange(len(sequences)), [len(X) for X in sequences])
    across = cosines[label[:, None] != label[None, :]].mean()
    return {
        "shared_energy": shared / total,
        "sequence_energy": within / total,
        "token_energy": own / total,
        "similarity_across": across,
    }


def head_numbers(A, S, V):
    """Attention metrics of one head of one sequence: map, scaled scores and values over its real tokens."""
    T = len(A)
    H = np.array([_entropy(row) for row in A])
    average = A.mean(0)
    U = np.full_like(A, 1 / T)
    J = np.full_like(A, 1 / T)
    s = np.linalg.svd(A, compute_uv=False)
    divergence = np.array([(row[row > 0] * np.log(row[row > 0] / average[row > 0])).sum() for row in A])
    std = S.std(1)
    return {
        "entropy": H.mean(),
        "normalized_entropy": (H / math.log(T)).mean(),
        "effective_keys": np.exp(H).mean(),
        "inverse_participation": (A**2).sum(1).mean(),
        "selectivity": divergence.mean(),
        "sink_mass": average.max(),
        "logit_std": std.mean(),
        "log_context_gauge": (std / math.sqrt(math.log(T))).mean(),
        "max_logit": S.max(),
        "branch_energy": (((A - U) @ V) ** 2).sum() / ((A @ V) ** 2).sum(),
        "contrast_gain": math.sqrt((A @ V).var(0).sum() / V.var(0).sum()),
        "attention_s1": s[0],
        "attention_s2": s[1],
        "outlier_share": s[0] ** 2 / (A**2).sum(),
        "attention_stable_rank": (A**2).sum() / s[0] ** 2,
        "uniform_distance": np.linalg.svd(A - U, compute_uv=False)[0],
        "smoothing_gain": np.linalg.svd(A - J @ A, compute_uv=False)[0],
    }
