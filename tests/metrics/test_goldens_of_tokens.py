"""Golden numbers of clouds, keys and heads, each in the setting that `golden.toml` gives."""

import math

import torch

import fullrank.metrics as metrics
from golden import assert_golden


def normal(generator, *shape, std=1.0, dtype=torch.float64):
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def layer_norm(X):
    return torch.nn.functional.layer_norm(X, X.shape[-1:], eps=1e-5)


# ------------------------------------------------------------------ token_geometry


def test_tg_gride(generator):
    found = []
    for d in (2, 5, 10):
        basis = torch.linalg.qr(normal(generator, 64, d)).Q
        clouds = torch.rand(4, 1000, d, generator=generator, dtype=torch.float64) @ basis.T
        found.append(metrics.intrinsic_dimension(clouds).mean())
    assert_golden("tg-gride", found)


# ------------------------------------------------------------------ layernorm_expressivity


def unselectable(generator, d, n, draws, change=lambda K: K):
    return metrics.unselectable_keys(change(normal(generator, draws, n, d))).mean()


def test_le_unselectable(generator):
    grid = ((3, 20), (3, 60), (10, 20), (10, 60))
    assert_golden("le-unselectable", [unselectable(generator, d, n, 6) for d, n in grid])


def test_le_unselectable_wide(generator):
    assert_golden("le-unselectable-wide", unselectable(generator, 12, 60, 6))


def test_le_after_ln(generator):
    """Equal norms make every key an extreme point; gain and bias keep it (an ellipsoid)."""
    gain, bias = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5, normal(generator, 3)
    assert_golden("le-after-ln", unselectable(generator, 3, 20, 4, lambda K: layer_norm(K) * gain + bias))
    assert_golden("le-after-ln", unselectable(generator, 10, 60, 2, layer_norm))


def test_le_after_wk(generator):
    found = []
    for d_k in (3, 5):
        keys = layer_norm(normal(generator, 8, 60, 6)) @ normal(generator, 8, 6, d_k)
        found.append(metrics.unselectable_keys(keys).mean())
    assert_golden("le-after-wk", found)


# ------------------------------------------------------------------ head_channel


def test_hc_head_dof(generator):
    W_O = normal(generator, 768, 768)
    B = normal(generator, 768, 64)
    found = [
        metrics.head_ambiguity(W_O, heads=12, tokens=128).degrees_of_freedom,
        metrics.head_ambiguity(W_O, heads=12, tokens=128, readout=B).degrees_of_freedom,
        metrics.head_ambiguity(W_O, heads=12, tokens=512, readout=B).degrees_of_freedom,
    ]
    assert_golden("hc-head-dof", found)


def attention_stack(seed, layers, *, skip, n=32, d=64):
    """X + A(X) X W with all W ~ N(0, 1/d), the states of every layer."""
    generator = torch.Generator().manual_seed(seed)
    X = normal(generator, n, d)
    states = [X]
    for _ in range(layers):
        Q, K, W = (normal(generator, d, d, std=1 / math.sqrt(d)) for _ in range(3))
        A = ((X @ Q) @ (X @ K).T / math.sqrt(d)).softmax(-1)
        X = skip * X + A @ X @ W
        states.append(X)
    return torch.stack(states)


def test_hc_residual_ranks():
    """The numerical rank stays full while the stable rank falls to one."""
    runs = torch.stack([attention_stack(seed, 12, skip=1) for seed in range(5)])
    for rank in metrics.numerical_rank(runs).flatten():
        assert_golden("hc-residual-numerical-rank", rank)
    stable = metrics.stable_rank(runs[:, [0, 12]]).median(0).values
    assert_golden("hc-residual-stable-rank", stable)


def test_hc_no_residual_stable_rank():
    runs = torch.stack([attention_stack(seed, 4, skip=0) for seed in range(5)])
    assert_golden("hc-no-residual-stable-rank", metrics.stable_rank(runs[:, 2]).mean())


def exact_layer_norm(X):
    centered = X - X.mean(-1, keepdim=True)
    return centered / centered.square().mean(-1, keepdim=True).sqrt()


def test_hc_ln_affine_dimension(generator):
    d = 16

    def plane(n, k):
        return normal(generator, n, k) @ normal(generator, k, d) + normal(generator, d)

    ray = torch.rand(7, 1, generator=generator, dtype=torch.float64) * normal(generator, d)
    ones = torch.ones(d, dtype=torch.float64)
    with_ones = torch.outer(normal(generator, 9), normal(generator, d)) + torch.outer(normal(generator, 9), ones)
    cases = [plane(7, 1), plane(9, 2), ray, with_ones, normal(generator, 40, d), normal(generator, 8, d)]
    before = [int(metrics.centered_numerical_rank(X)) for X in cases]
    assert before == [1, 2, 1, 2, 16, 7]
    assert_golden("hc-ln-affine-dimension", [metrics.centered_numerical_rank(exact_layer_norm(X)) for X in cases])


def test_hc_ln_exact_identity(generator):
    for n, k in ((6, 6), (6, 3), (12, 4)):
        X = normal(generator, n, k) @ normal(generator, k, 16)
        gain = torch.rand(16, generator=generator, dtype=torch.float64) + 0.5
        bias = normal(generator, 16)
        normed = torch.nn.functional.layer_norm(X, (16,), gain, bias, 1e-5)
        projected = X - X.mean(-1, keepdim=True)
        found = metrics.numerical_rank(normed - bias) - metrics.numerical_rank(projected)
        assert_golden("hc-ln-exact-identity", found)


def grown_ranks(seed, n=32, d=32, H=8):
    """Rank of what eight heads, and what a ReLU MLP, make of the same rank-one tokens, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return normal(generator, *shape, std=1 / math.sqrt(shape[0]), dtype=torch.float32)

    X = torch.outer(normal(generator, n), normal(generator, d)).float()
    out = torch.zeros(n, d)
    for _ in range(H):
        A = ((X @ weight(d, d // H)) @ (X @ weight(d, d // H)).T / math.sqrt(d // H)).softmax(-1)
        out += A @ X @ weight(d, d // H) @ weight(d // H, d)
    hidden = (X @ weight(d, 4 * d) + normal(generator, 4 * d, dtype=torch.float32)).relu()
    return torch.stack([metrics.numerical_rank(out), metrics.numerical_rank(hidden @ weight(4 * d, d))])


def test_hc_rank_growth(generator):
    """Heads add up to rank H, an MLP goes further; W_OV ∝ I keeps attention inside the span of its tokens."""
    X = normal(generator, 6, 64)
    A = normal(generator, 6, 6).softmax(-1)
    spans = [torch.cat([X, A @ X @ W]) for W in (normal(generator, 64, 64), torch.eye(64, dtype=torch.float64))]
    grown = torch.stack([grown_ranks(seed) for seed in range(9)]).median(0).values
    assert_golden("hc-rank-growth", [*grown, *(metrics.numerical_rank(both) for both in spans)])
