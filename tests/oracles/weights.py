"""Numbers of weights from their definitions, with loops, in float64."""

import math

import torch


def weight_rms(W):
    return math.sqrt(sum(float(w) ** 2 for w in W.flatten()) / W.numel())


def condensation(W):
    rows = [row for row in W if any(float(w) != 0 for w in row)]
    cosines = []
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
                cosines.append(abs(dot) / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)))
    return sum(cosines) / len(cosines)


def spectral_norm(W):
    return float(torch.linalg.matrix_norm(W.double(), 2))


def weight_stable_rank(W):
    return sum(float(w) ** 2 for w in W.flatten()) / spectral_norm(W) ** 2


def weight_effective_rank(W):
    sigma = torch.linalg.svdvals(W.double())
    shares = [float(s / sigma.sum()) for s in sigma]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def qk_eigenvalue_variance(W_Q, W_K):
    """All eigenvalues of the d × d matrix."""
    M = torch.tensor([[float(q @ k) for k in W_K.double().T] for q in W_Q.double().T], dtype=torch.float64)
    eigenvalues = [complex(x) for x in torch.linalg.eigvals(M)]
    mean = sum(eigenvalues) / len(eigenvalues)
    return sum(abs(x - mean) ** 2 for x in eigenvalues) / len(eigenvalues)


def value_output_sign(W_V, W_O):
    """Of the eigenvalues of the d × d matrix the d_k that are largest: the others are zeros."""
    H = W_O.double() @ W_V.double()
    eigenvalues = sorted((complex(x) for x in torch.linalg.eigvals(H)), key=abs, reverse=True)[: W_V.shape[0]]
    return sum(math.copysign(1, x.real) for x in eigenvalues) / len(eigenvalues)
