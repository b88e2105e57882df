"""Metrics of states written from their definitions with loops, in float64: slow twins of `fullrank.metrics`.

Each takes the real tokens of one sequence, (tokens, width) float64.
"""

import math

import torch


def _dot(x, y):
    return sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _norm(x):
    return math.sqrt(_dot(x, x))


def _energy(X):
    return sum(_dot(x, x) for x in X)


def _mean(X):
    return sum(X[1:], X[0].clone()) / len(X)


def rms(X):
    return math.sqrt(_energy(X) / (len(X) * len(X[0])))


def similarity(X):
    cosines = [
        _dot(X[t], X[s]) / (_norm(X[t]) * _norm(X[s]))
        for t in range(len(X))
        for s in range(len(X))
        if s != t and _norm(X[t]) > 0 and _norm(X[s]) > 0
    ]
    return sum(cosines) / len(cosines) if cosines else math.nan


def residual(X):
    x_bar = _mean(X)
    return math.sqrt(sum(_dot(x - x_bar, x - x_bar) for x in X) / _energy(X))


def update_share(X, X_previous):
    return math.sqrt(_energy(X - X_previous) / _energy(X_previous))


def neighbour_cosine(X, X_previous):
    inner = sum(_dot(x, y) for x, y in zip(X, X_previous, strict=True))
    return inner / math.sqrt(_energy(X) * _energy(X_previous))


def identity_distance(X, X_0):
    Y, Y_0 = ([x - _mean(Z) for x in Z] for Z in (X, X_0))
    inner = sum(_dot(x, y) for x, y in zip(Y, Y_0, strict=True))
    return math.sqrt(1 - inner**2 / (_energy(Y) * _energy(Y_0)))


def channel_entropy(X):
    energy = [_dot(X[:, c], X[:, c]) for c in range(X.shape[1])]
    shares = [e / sum(energy) for e in energy]
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def max_to_median(X):
    size = sorted(abs(float(x)) for x in X.flatten())
    return size[-1] / size[(len(size) - 1) // 2]


def max_abs(X):
    return max(abs(float(x)) for token in X for x in token)


def max_abs_position(X):
    return float(max(range(len(X)), key=lambda t: max(abs(float(x)) for x in X[t])))


def distinct_at_dtype(X):
    T = len(X)
    different = [bool((X[t] != X[s]).any()) for t in range(T) for s in range(T) if s != t]
    return sum(different) / len(different)


def span_novelty(X, X_0):
    basis = []
    for row in X_0:  # Gram–Schmidt, twice for stability
        v = row.clone()
        for _ in range(2):
            for q in basis:
                v = v - _dot(v, q) * q
        if _norm(v) > 1e-9 * _norm(row):
            basis.append(v / _norm(v))
    outside = 0.0
    for x in X:
        for q in basis:
            x = x - _dot(x, q) * q
        outside += _dot(x, x)
    return outside / _energy(X)


def shares(sequences):
    """Energy shares of a list of (tokens, width) sequences."""
    tokens = [x for X in sequences for x in X]
    m = _mean(tokens)
    total = sum(_dot(x, x) for x in tokens)
    shared = len(tokens) * _dot(m, m)
    means = [_mean(X) for X in sequences]
    sequence = sum(len(X) * _dot(x_bar - m, x_bar - m) for X, x_bar in zip(sequences, means, strict=True))
    token = sum(_dot(x - x_bar, x - x_bar) for X, x_bar in zip(sequences, means, strict=True) for x in X)
    return shared / total, sequence / total, token / total


def similarity_across(sequences):
    cosines = [
        _dot(x, y) / (_norm(x) * _norm(y))
        for a, X in enumerate(sequences)
        for b, Y in enumerate(sequences)
        if a != b
        for x in X
        for y in Y
    ]
    return sum(cosines) / len(cosines)


def similarity_standardized(sequences):
    tokens = torch.cat(list(sequences))
    mean = _mean(tokens)
    std = torch.tensor(
        [math.sqrt(_dot(tokens[:, c] - mean[c], tokens[:, c] - mean[c]) / len(tokens)) for c in range(tokens.shape[1])],
        dtype=torch.float64,
    )
    return [similarity((X - mean) / std) for X in sequences]


def ranks(X, *, eps, tau=0.5, largest=None):
    """Every rank from a dense singular value decomposition."""
    T, d = X.shape
    sigma = [float(s) for s in torch.linalg.svdvals(X)]

    def entropy_rank(weights):
        p = [w / sum(weights) for w in weights]
        return math.exp(-sum(q * math.log(q) for q in p if q > 0))

    energy = [s**2 for s in sigma]
    return {
        "stable_rank": sum(energy) / energy[0],
        "gram_stable_rank": sum(e**2 for e in energy) / energy[0] ** 2,
        "effective_rank": entropy_rank(sigma),
        "spectral_entropy_rank": entropy_rank(energy),
        "participation_ratio": sum(energy) ** 2 / sum(e**2 for e in energy),
        "numerical_rank": sum(s > (largest or sigma[0]) * max(T, d) * eps for s in sigma),
        "soft_rank": sum(e >= tau * sum(energy) / d for e in energy),
    }


def orthogonality_gap(X):
    n = len(X)
    gram = [[_dot(x, y) / _energy(X) - (i == j) / n for j, y in enumerate(X)] for i, x in enumerate(X)]
    return math.sqrt(sum(g**2 for row in gram for g in row))


def isometry_gap(X):
    eigenvalues = [float(s) ** 2 for s in torch.linalg.svdvals(X)]
    return math.log(sum(eigenvalues) / len(X)) - sum(math.log(e) for e in eigenvalues) / len(X)


def neighbours(X, k):
    """Sets of the k nearest others of every token."""
    found = []
    for t in range(len(X)):
        others = sorted((s for s in range(len(X)) if s != t), key=lambda s: _norm(X[s] - X[t]))
        found.append(others[:k])
    return found


def neighbourhood_overlap(X, X_previous, k):
    pairs = zip(neighbours(X, k), neighbours(X_previous, k), strict=True)
    return sum(len(set(a) & set(b)) / k for a, b in pairs) / len(X)


def two_nn(X):
    logs = []
    for t, near in enumerate(neighbours(X, 2)):
        first, second = (_norm(X[s] - X[t]) for s in near)
        logs.append(math.log(second / first))
    return len(logs) / sum(logs)


def gride_log_likelihood(X, scale, d):
    """Σ log p(μ | d), up to what does not depend on d."""
    total = 0.0
    for t, near in enumerate(neighbours(X, scale)):
        mu = _norm(X[near[scale - 1]] - X[t]) / _norm(X[near[scale // 2 - 1]] - X[t])
        total += math.log(d) + (scale - scale // 2 - 1) * math.log(mu**d - 1)
        total -= (d * (scale - 1) + 1) * math.log(mu)
    return total


def head_similarity(contributions):
    return similarity(torch.stack([head.flatten() for head in contributions]))


def nearest_head(contributions):
    """Of each head the largest cosine with another, and that other."""
    flat = [head.flatten() for head in contributions]
    found = []
    for h, one in enumerate(flat):
        others = [(float(one @ other / _norm(one) / _norm(other)), g) for g, other in enumerate(flat) if g != h]
        found.append(max(others))
    return found


def in_hull(K, i):
    """Whether key i is a convex combination of the others: the dual of the programme that the fast path solves."""
    from scipy.optimize import linprog

    others = torch.cat([K[:i], K[i + 1 :]])
    equal = torch.cat([others.T, torch.ones(1, len(others), dtype=K.dtype)]).numpy()
    target = torch.cat([K[i], torch.ones(1, dtype=K.dtype)]).numpy()
    found = linprog(torch.zeros(len(others)).numpy(), A_eq=equal, b_eq=target, bounds=(0, None), method="highs")
    return found.status == 0
