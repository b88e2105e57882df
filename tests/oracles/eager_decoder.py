"""Every number of a Llama decoder from float64 eager attention maps and plain hooks, one sequence at a time.

Shares no code with the package: definitions are written out again.
"""

import copy
import math

import numpy as np
import torch


def hooked(model, **inputs):
    """One forward of the model as it is, and what plain hooks saw: a dict of lists of tensors, one per layer.

    `out` is the stream before the first layer and after each, `mid` the stream between attention and MLP, `values`
    (batch, heads, T, width) are those of each group repeated for its query heads.
    """
    found = {"out": [], "mid": [], "values": []}
    handles = [model.layers[0].register_forward_pre_hook(lambda m, args: found["out"].append(args[0]))]
    for layer in model.layers:
        handles += [
            layer.register_forward_hook(lambda m, a, y: found["out"].append(y[0] if isinstance(y, tuple) else y)),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: found["mid"].append(args[0])),
            layer.self_attn.v_proj.register_forward_hook(lambda m, a, y: found["values"].append(y)),
        ]
    try:
        with torch.no_grad():
            outputs = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups = model.config.num_key_value_heads
    repeats = model.config.num_attention_heads // groups
    found["values"] = [
        V.unflatten(-1, (groups, -1)).transpose(1, 2).repeat_interleave(repeats, 1) for V in found["values"]
    ]
    return outputs, found


def collect(model, sequences):
    """States, maps and values that an eager float64 copy gives for each sequence alone, without any padding.

    Rotary positions enter scores by their differences only, so that a sequence after padding gives the same maps.
    Returns, by name (`out`, `mid`, `values`, `maps`), a list over layers of lists over sequences of numpy arrays.
    """
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    each = []
    for ids in sequences:
        outputs, found = hooked(model, input_ids=ids[None], output_attentions=True)
        each.append(found | {"maps": outputs.attentions})
    return {
        name: [[one[name][layer][0].double().numpy() for one in each] for layer in range(len(each[0][name]))]
        for name in each[0]
    }


def late(T):
    """Which of T tokens are late: rank r, counted from 1, with 2 r > T."""
    return np.array([2 * r > T for r in range(1, T + 1)])


def eligible(T):
    """Which of T causal queries see at least min(32, ⌈T/4⌉) keys; query r sees r of them."""
    return np.array([r >= min(32, math.ceil(T / 4)) for r in range(1, T + 1)])


def token_numbers(X):
    """Stream metrics of the tokens X (tokens, width) of one sequence."""
    T = len(X)
    cosines = [X[i] @ X[j] / np.linalg.norm(X[i]) / np.linalg.norm(X[j]) for i in range(T) for j in range(i)]
    centred = X - X.mean(0)
    s, s_centred = np.linalg.svd(X, compute_uv=False), np.linalg.svd(centred, compute_uv=False)
    return {
        "rms": math.sqrt((X**2).mean()),
        "similarity": np.mean(cosines),
        "residual": np.linalg.norm(centred) / np.linalg.norm(X),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "centered_stable_rank": (s_centred**2).sum() / s_centred[0] ** 2,
    }


def energy_numbers(sequences):
    """Shares of the energy of all tokens: what all share, what one sequence shares, what a token has of its own."""
    everything = np.concatenate(sequences)
    total, mean = (everything**2).sum(), everything.mean(0)
    return {
        "shared_energy": len(everything) * (mean**2).sum() / total,
        "sequence_energy": sum(len(X) * ((X.mean(0) - mean) ** 2).sum() for X in sequences) / total,
        "token_energy": sum(((X - X.mean(0)) ** 2).sum() for X in sequences) / total,
    }


def row_numbers(A, V, rows):
    """Means over the chosen rows of one causal map A (T, T) with values V (T, width)."""
    kept = [t for t in range(len(A)) if rows[t]]
    c = np.mean([A[t] for t in kept], axis=0)
    H, share, Y2, divergence, above, below = [], [], [], [], 0.0, 0.0
    for t in kept:
        p, seen = A[t, : t + 1], c[: t + 1] / c[: t + 1].sum()
        some = p > 0
        H.append(-(p[some] * np.log(p[some])).sum())
        share.append(H[-1] / math.log(t + 1))
        Y2.append((p**2).sum())
        divergence.append((p[some] * np.log(p[some] / seen[some])).sum())
        above += ((p @ V[: t + 1] - V[: t + 1].mean(0)) ** 2).sum()
        below += ((p @ V[: t + 1]) ** 2).sum()
    return {
        "entropy": np.mean(H),
        "normalized_entropy": np.mean(share),
        "inverse_participation": np.mean(Y2),
        "selectivity": np.mean(divergence),
        "sink_mass": c.max(),
        "branch_energy": above / below,
        "contrast_gain": math.sqrt((A @ V)[kept].var(0).sum() / V.var(0).sum()),
    }


def spectral_numbers(A, rows):
    """Singular values of the chosen rows of one causal map, less the running mean, and less the rows' mean."""
    T = len(A)
    U = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    M = A[rows]
    s = np.linalg.svd(M, compute_uv=False)
    return {
        "attention_s1": s[0],
        "attention_s2": s[1],
        "uniform_distance": np.linalg.svd(M - U[rows], compute_uv=False)[0],
        "smoothing_gain": np.linalg.svd(M - M.mean(0), compute_uv=False)[0],
    }
