"""Golden numbers of normalised networks, each in the setting that `golden.toml` gives."""

import math

import torch

import fullrank.metrics as metrics
from golden import assert_golden


def normal(generator, *shape, std=1.0, dtype=torch.float64):
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def layer_norm(X):
    return torch.nn.functional.layer_norm(X, X.shape[-1:], eps=1e-5)


# ------------------------------------------------------------------ batchnorm


def m_recursion(d, gamma, steps, seed):
    """Covariances M of a batch-normalised linear net over depth; their square roots have the spectrum of the states."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.eye(d, dtype=torch.float64)
    for step in range(steps):
        W = normal(generator, d, d)
        W = W if math.isinf(gamma) else torch.eye(d, dtype=torch.float64) + gamma * W
        M = W @ M @ W.T
        D = M.diagonal().rsqrt()
        M = D[:, None] * M * D
        if step >= steps // 2:
            yield M


def soft_rank_and_participation(d, gamma, steps=8000):
    eigenvalues = torch.linalg.eigvalsh(torch.stack(list(m_recursion(d, gamma, steps, seed=0)))).flip(-1).clamp(min=0)
    found = metrics.ranks(eigenvalues.sqrt(), tokens=10**6, width=d, dtype=torch.float64)
    return found["soft_rank"].mean(), found["participation_ratio"].mean()


def test_bn_soft_rank_and_participation():
    found = [soft_rank_and_participation(d, 1.0) for d in (8, 16, 32)]
    assert_golden("bn-soft-rank-gamma1", [soft for soft, _ in found])
    assert_golden("bn-participation", [ratio for _, ratio in found])


def test_bn_soft_rank_without_identity():
    assert_golden("bn-soft-rank-gamma-infinity", [soft_rank_and_participation(d, math.inf)[0] for d in (8, 16, 32)])


def test_bn_orthogonality_plateau(generator):
    found = []
    widths = (32, 128, 256, 512)
    for d in widths:
        H = normal(generator, d, 4, dtype=torch.float32)
        gaps = []
        for layer in range(1, 121):
            H = normal(generator, d, d, std=1 / math.sqrt(d), dtype=torch.float32) @ H
            H = H / H.norm(dim=1, keepdim=True) / math.sqrt(d)
            if layer >= 40:
                gaps.append(metrics.orthogonality_gap(H.T))
        found.append(torch.stack(gaps).mean())
    assert_golden("bn-orthogonality-plateau", found)
    log_d, log_V = torch.tensor(widths).double().log(), torch.stack(found).double().log()
    slope = ((log_d - log_d.mean()) * (log_V - log_V.mean())).sum() / (log_d - log_d.mean()).square().sum()
    assert_golden("bn-orthogonality-slope", slope)


def test_bn_isometry_gap():
    """Orthogonal weights bring a batch closer to isometry with depth, Gaussian ones away from it."""
    found = []
    for draw in (lambda W: torch.linalg.qr(W).Q, lambda W: W / math.sqrt(100)):
        gaps = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            H = normal(generator, 100, 100)
            states = []
            for _ in range(200):
                H = draw(normal(generator, 100, 100)) @ H
                H = H / H.square().mean(1, keepdim=True).sqrt()
                states.append(H.T)
            gaps.append(metrics.isometry_gap(torch.stack([states[4], states[199]])))
        found.extend(torch.stack(gaps).mean(0).tolist())
    assert_golden("bn-isometry-gap", found)


def test_bn_ln_isometry_decay(generator):
    U, s, Vh = torch.linalg.svd(normal(generator, 1000, 10), full_matrices=False)
    s[0] *= 100
    X = (U * s @ Vh).T
    gaps = [metrics.isometry_gap(X)]
    for _ in range(16):
        W = normal(generator, 1000, 1000, std=1 / math.sqrt(1000))
        X = layer_norm((X @ W).relu())
        gaps.append(metrics.isometry_gap(X))
    assert_golden("bn-ln-isometry-decay", [gaps[layer] for layer in (0, 2, 4, 12, 16)])


def test_bn_linear_vanilla_rank(generator):
    """Depth eats the numerical rank from below, at a rate set by ε: the golden depths are those of float64."""
    H = normal(generator, 32, 32)
    found = {}
    for layer in range(1, 10_001):
        H = normal(generator, 32, 32) @ H
        H = H / H.norm()
        if layer in (1, 30, 100, 300, 1000, 10_000):
            found[layer] = metrics.numerical_rank(H)
    assert_golden("bn-linear-vanilla-rank", list(found.values()))


def relu_mlp(seed, depth, *, batch_norm):
    """Hidden states of a ReLU MLP of torch's default initialisation, width 128, on 128 uniform inputs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, bound):
        return (2 * torch.rand(shape, generator=generator) - 1) * bound

    h = torch.rand(128, 784, generator=generator)
    for _ in range(depth + 1):
        bound = 1 / math.sqrt(h.shape[1])
        h = h @ uniform(h.shape[1], 128, bound=bound)
        h = h + (0 if batch_norm else uniform(128, bound=bound))
        if batch_norm:
            h = torch.nn.functional.batch_norm(h, None, None, training=True)
        h = h.relu()
    return h


def test_bn_fig1_rank():
    """Published Fig. 1 is the float32 threshold eating a geometric spectrum: soft measures fall at once."""
    depths = (0, 2, 4, 6, 10, 12, 20, 32)
    nets = [[relu_mlp(seed, depth, batch_norm=False) for depth in depths] for seed in range(3)]
    runs = torch.stack([torch.stack(states) for states in nets])
    assert_golden("bn-fig1-rank-synthetic", metrics.numerical_rank(runs).mean(0))
    assert_golden("bn-fig1-participation", metrics.participation_ratio(runs).mean(0)[1:3])
    normed = torch.stack([relu_mlp(0, depth, batch_norm=True) for depth in (0, 8, 16, 32)])
    for rank in metrics.numerical_rank(normed):
        assert_golden("bn-fig1-rank-bn", rank)
    assert_golden("bn-fig1-participation-bn", metrics.participation_ratio(normed)[[0, 3]])
