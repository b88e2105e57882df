"""Soft rank, orthogonality and isometry under normalisation, against networks that are really run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden

from fullrank import metrics
from fullrank.architecture import Architecture
from fullrank.errors import TheoryError
from fullrank.theory.batchnorm import (
    covariance_step,
    orthogonality_contraction,
    orthogonality_gap_bound,
    orthogonality_gap_plateau,
    orthogonality_gap_square,
    product_exponents,
    product_rank,
    soft_rank_bound,
    stationary_soft_rank,
)
from fullrank.theory.batchnorm_course import BATCHNORM, orthogonality_course
from fullrank.theory.batchnorm_isometry import (
    centered_kernel,
    gaussian_isometry_growth,
    isometry_base,
    isometry_course,
    isometry_gap_of,
    isometry_law,
    orthogonal_isometry_bound,
    orthogonal_isometry_rate,
)


def unit(H):
    return H / np.linalg.norm(H, axis=-1, keepdims=True)


def haar(rng, width):
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    return q * np.sign(np.diagonal(r))


PHI = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: torch.nn.functional.gelu(torch.from_numpy(z)).numpy(),
    "silu": lambda z: torch.nn.functional.silu(torch.from_numpy(z)).numpy(),
    "tanh": np.tanh,
    "identity": lambda z: z,
}


# ------------------------------------------------------------ soft rank


def test_soft_rank_and_participation_meet_their_golden_numbers():
    found = [stationary_soft_rank(d, gamma=1.0, steps=400, chains=32, seed=0) for d in (8, 16, 32)]
    assert_golden("bn-soft-rank-gamma1", [one.soft_rank for one in found])
    assert_golden("bn-participation", [one.participation for one in found])
    without = [stationary_soft_rank(d, steps=400, chains=32, seed=1) for d in (8, 16, 32)]
    assert_golden("bn-soft-rank-gamma-infinity", [one.soft_rank for one in without])


@pytest.mark.slow
def test_soft_rank_where_layers_hardly_move_and_where_they_are_wide_meet_their_golden_numbers():
    slow = [stationary_soft_rank(d, gamma=0.01, steps=20_000, chains=2, seed=0) for d in (8, 16, 32)]
    assert_golden("bn-soft-rank-gamma001", [one.soft_rank for one in slow])
    for gamma in (1.0, math.inf):
        sizes = {8: (400, 32), 16: (400, 32), 32: (400, 32), 128: (500, 4), 256: (900, 2)}
        found = [
            stationary_soft_rank(d, gamma=gamma, steps=steps, chains=chains, seed=0)
            for d, (steps, chains) in sizes.items()
        ]
        assert_golden("bn-soft-rank-paper-log2", np.log2([one.soft_rank for one in found]))


@pytest.mark.parametrize(("width", "gamma"), [(6, 0.3), (10, math.inf)])
def test_the_recursion_is_a_batch_norm_s_covariance_sample_by_sample(width, gamma):
    rng = np.random.default_rng(0)
    n = 4 * width
    H = rng.standard_normal((width, n))
    H = H / np.sqrt(np.mean(H**2, 1, keepdims=True))
    for _ in range(3):
        W = rng.standard_normal((width, width))
        step = W @ H if math.isinf(gamma) else H + gamma * W @ H
        after = step / np.sqrt(np.mean(step**2, 1, keepdims=True))
        assert covariance_step(H @ H.T / n, W, gamma=gamma) == pytest.approx(after @ after.T / n)
        H = after


@pytest.mark.parametrize("width", [6, 20])
def test_the_stationary_soft_rank_is_that_of_networks_with_batch_norms(width):
    law = stationary_soft_rank(width, steps=300, chains=32, seed=2)
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(32, width, 2 * width, generator=generator, dtype=torch.float64)
    soft, ratio = [], []
    for layer in range(300):
        H = torch.randn(32, width, width, generator=generator, dtype=torch.float64) @ H
        H = H / H.square().mean(-1, keepdim=True).sqrt()
        if layer >= 150 and layer % 5 == 0:
            soft.append(metrics.soft_rank(H.mT).mean())
            ratio.append(metrics.participation_ratio(H.mT).mean())
    assert law.soft_rank == pytest.approx(float(torch.stack(soft).mean()), rel=0.02)
    assert law.participation == pytest.approx(float(torch.stack(ratio).mean()), rel=0.02)
    assert law.layers == 32 * 150
    assert 0 < law.soft_rank_stderr < 0.02 * law.soft_rank


@pytest.mark.parametrize("shape", [(8, 30), (40, 12)])
def test_the_lower_bound_on_the_soft_rank_holds_for_every_matrix_and_threshold(shape):
    rng = np.random.default_rng(0)
    for power in (0.0, 1.0, 4.0):
        X = torch.from_numpy(rng.standard_normal(shape) * rng.random(shape[1]) ** power)
        ratio = float(metrics.participation_ratio(X))
        for tau in (0.0, 0.2, 0.5, 0.9):
            # eigenvalues relative to their mean over all of them, of which there are as many as features
            assert float(soft_rank_bound(ratio, tau=tau)) <= float(metrics.soft_rank(X, tau=tau))
    assert float(soft_rank_bound(2.0)) == 0.5


def test_chains_of_too_few_layers_are_refused():
    with pytest.raises(TheoryError, match="steps=1 and chains=4 must both be 2 or more"):
        stationary_soft_rank(4, steps=1, chains=4, seed=0)


# ------------------------------------------------------------ orthogonality


def gaps(width, samples, seed, *, hidden=None, layers=160, left_out=40):
    """Orthogonality gaps of linear layers with batch norms that do not centre."""
    rng = np.random.default_rng(seed)
    H = rng.standard_normal((width, samples))
    found = []
    for layer in range(layers):
        H = rng.standard_normal((hidden or width, width)) @ H
        if hidden:
            H = rng.standard_normal((width, hidden)) @ H
        H = unit(H) / width**0.5
        if layer >= left_out:
            found.append(np.linalg.norm(H.T @ H - np.eye(samples) / samples))
    return np.array(found)


def test_the_plateau_of_orthogonality_meets_its_golden_numbers():
    widths = np.array([32, 128, 256, 512])
    law = orthogonality_gap_plateau(width=widths, samples=4)
    assert_golden("bn-orthogonality-plateau", law)
    assert_golden("bn-orthogonality-slope", float(np.polyfit(np.log(widths), np.log(law), 1)[0]))


@pytest.mark.parametrize(("width", "samples"), [(64, 3), (256, 12)])
@pytest.mark.parametrize("hidden", [None, 96])
def test_the_plateau_is_that_of_networks_with_one_weight_or_two(width, samples, hidden):
    seen = np.concatenate([gaps(width, samples, seed, hidden=hidden) for seed in range(3)])
    sizes = {"width": width, "samples": samples, "hidden": hidden or np.inf}
    assert float(orthogonality_gap_plateau(**sizes)) == pytest.approx(seen.mean(), rel=0.07)
    assert float(orthogonality_gap_square(**sizes)) == pytest.approx(np.mean(seen**2), rel=0.13)


@pytest.mark.parametrize("samples", [2, 7])
def test_a_layer_multiplies_small_deviations_from_orthogonality_by_n_over_n_plus_2(samples):
    rng = np.random.default_rng(samples)
    off = rng.standard_normal((samples, samples))
    off = 0.05 * (off + off.T) / samples
    off -= np.trace(off) / samples * np.eye(samples)
    root = np.linalg.cholesky(np.eye(samples) / samples + off)
    normal = rng.standard_normal((400_000, samples))
    # rows of either sign of the deviation, of one noise: what is left is the linear part
    after = [unit(normal @ one.T) for one in (root, np.linalg.cholesky(np.eye(samples) / samples - off))]
    change = (after[0].T @ after[0] - after[1].T @ after[1]) / (2 * len(normal))
    slope = float((change * off).sum() / np.square(off).sum())
    assert slope == pytest.approx(float(orthogonality_contraction(samples)), rel=0.04)


@pytest.mark.parametrize("samples", [2, 3])
def test_networks_stay_below_the_theorem_s_bound_where_it_says_something(samples):
    """Rows of W H are Gaussian of covariance HᵀH: layers of a width at which the theorem speaks can be drawn."""
    rng, width = np.random.default_rng(0), 50_000
    start = 0.3 * np.eye(samples) + 1.0
    G = start / np.trace(start)
    least, seen = math.inf, []
    for _ in range(25):
        H = unit(rng.standard_normal((width, samples)) @ np.linalg.cholesky(G).T) / width**0.5
        G = H.T @ H
        seen.append(np.linalg.norm(G - np.eye(samples) / samples))
        least = min(least, np.linalg.eigvalsh(G)[0] ** 0.5)
    layers = np.arange(25)
    bound = orthogonality_gap_bound(layers, width=width, samples=samples, least=least)
    assert (np.array(seen) < bound).all()
    assert bound[-1] < 0.3 < (1 - 1 / samples) ** 0.5
    assert float(orthogonality_gap_bound(0, width=1.0, samples=2.0, least=0.5)) == pytest.approx(2 + 12)


# ------------------------------------------------------------ without a norm


@pytest.mark.parametrize("width", [4, 12])
def test_the_exponents_of_products_are_those_of_a_long_product_held_orthogonal(width):
    rng = np.random.default_rng(width)
    Q, total, layers = np.eye(width), np.zeros(width), 4000
    for _ in range(layers):
        Q, R = np.linalg.qr(rng.standard_normal((width, width)) @ Q)
        total += np.log(np.abs(np.diagonal(R)))
    assert total / layers == pytest.approx(product_exponents(width), abs=0.06)


def test_the_numerical_rank_of_a_linear_network_meets_its_golden_numbers_in_float64_and_not_in_float32():
    depths = [1, 30, 100, 300, 1000, 10_000]
    assert_golden("bn-linear-vanilla-rank", product_rank(depths, width=32))
    single = product_rank(depths, width=32, eps=float(np.finfo(np.float32).eps))
    with pytest.raises(AssertionError):
        assert_golden("bn-linear-vanilla-rank", single)


@pytest.mark.parametrize("width", [12, 24])
def test_the_numerical_rank_is_that_of_products_of_gaussian_matrices(width):
    depths = (10, 40, 160)
    ranks = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        H, found = np.eye(width), []
        for layer in range(1, 161):
            H = rng.standard_normal((width, width)) @ H
            H /= np.linalg.norm(H)
            if layer in depths:
                found.append(np.linalg.matrix_rank(H))
        ranks.append(found)
    assert product_rank(depths, width=width) == pytest.approx(np.mean(ranks, 0), abs=1.2)


# ------------------------------------------------------------ isometry


def test_beta_meets_its_golden_numbers():
    assert_golden("bn-ln-beta0", [isometry_base(one) for one in ("identity", "tanh", "relu")])


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", lambda z: z**3 - z, np.abs])
def test_beta_is_the_slope_of_the_kernel_and_the_sum_of_hermite_coefficients(activation):
    from scipy.special import eval_hermitenorm

    z = np.linspace(-12, 12, 200_001)
    weight = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    value = PHI[activation](z) if isinstance(activation, str) else activation(z)
    squares = [(weight @ (value * eval_hermitenorm(k, z))) ** 2 / math.factorial(k) for k in range(1, 40)]
    assert isometry_base(activation) == pytest.approx(2 - squares[0] / sum(squares), abs=3e-3)
    if isinstance(activation, str):
        slope = float(centered_kernel(1e-4, activation) - centered_kernel(-1e-4, activation)) / 2e-4
        assert isometry_base(activation) == pytest.approx(2 - slope, abs=2e-3)


def test_an_activation_without_a_linear_part_has_beta_two_and_a_constant_none():
    assert isometry_base(np.abs) == pytest.approx(2.0)
    with pytest.raises(TheoryError, match="is constant"):
        isometry_base(np.ones_like)
    with pytest.raises(TheoryError, match="activation='swish' is unknown: there are identity, relu"):
        isometry_base("swish")


def golden_inputs():
    rng = np.random.default_rng(0)
    U, s, V = np.linalg.svd(rng.standard_normal((1000, 10)), full_matrices=False)
    s[0] *= 100
    return U * s @ V


def test_the_course_of_the_isometry_gap_meets_its_golden_numbers_below_the_paper_s_line():
    X = golden_inputs()
    course = isometry_course(X.T @ X, depth=16, activation="relu")
    assert_golden("bn-ln-isometry-decay", course[[0, 2, 4, 12, 16]])
    line = isometry_law(np.arange(17), gap=course[0], base=isometry_base("relu"), samples=10)
    assert (course <= line).all()


def test_close_to_isometry_the_gap_falls_by_the_square_of_the_kernel_s_slope():
    X = golden_inputs()
    for activation in ("relu", "gelu", "silu"):
        course = isometry_course(X.T @ X, depth=60, activation=activation)
        base = isometry_base(activation)
        assert course[60] / course[59] == pytest.approx((2 - base) ** 2, rel=0.02)
        assert (2 - base) ** 2 < 1 / base


@pytest.mark.parametrize("samples", [4, 8])
@pytest.mark.parametrize("activation", PHI)
def test_the_course_is_that_of_wide_networks_with_layer_norms(samples, activation):
    """Units of a layer are Gaussian of the covariance of its inputs: 100,000 of them are drawn from it."""
    rng, width = np.random.default_rng(samples), 100_000
    X = rng.standard_normal((samples, width)) + 2 * rng.standard_normal(width)
    X = (X - X.mean(1, keepdims=True)) / X.std(1, keepdims=True)
    course = isometry_course(X @ X.T, depth=5, activation=activation)
    for layer in range(6):
        assert course[layer] == pytest.approx(float(metrics.isometry_gap(torch.from_numpy(X))), rel=0.03)
        units = np.linalg.cholesky(X @ X.T / width) @ rng.standard_normal((samples, width))
        X = PHI[activation](units)
        X = (X - X.mean(1, keepdims=True)) / X.std(1, keepdims=True)


def test_dependent_vectors_have_an_infinite_gap_and_orthogonal_ones_none():
    assert isometry_gap_of([np.ones((3, 3)), 2 * np.eye(3)]).tolist() == [math.inf, 0.0]


# ------------------------------------------------------------ orthogonal weights


@pytest.mark.parametrize("width", [12, 30])
def test_orthogonal_weights_take_a_fixed_share_of_a_small_isometry_gap(width):
    rng = np.random.default_rng(width)
    falls = []
    for _ in range(300):
        off = rng.standard_normal((width, width))
        off = 0.01 * (off + off.T) / width**0.5
        np.fill_diagonal(off, 0.0)
        M = np.eye(width) + off
        after = covariance_step(M, haar(rng, width))
        falls.append((isometry_gap_of(after), isometry_gap_of(M)))
    after, before = np.mean(falls, 0)
    assert 1 - after / before == pytest.approx(float(orthogonal_isometry_rate(width)), rel=0.1)


@pytest.mark.parametrize("width", [10, 20])
def test_networks_with_orthogonal_weights_lose_more_of_the_gap_than_the_authors_line_does(width):
    rng = np.random.default_rng(0)
    H = rng.standard_normal((width, width))
    first = float(isometry_gap_of(H @ H.T))
    for layer in range(1, 101):
        H = unit(haar(rng, width) @ H)
        if layer % 25 == 0:
            seen = float(isometry_gap_of(H @ H.T))
            assert seen <= float(orthogonal_isometry_bound(layer, gap=first, width=width))


@pytest.mark.parametrize("width", [16, 50])
def test_gaussian_weights_widen_the_isometry_gap_without_end_which_float64_cannot_show(width):
    """Determinants are added up layer by layer, where singular values of the states have met their rounding."""
    rng, layers = np.random.default_rng(width), 300
    H = rng.standard_normal((width, width))
    log_det, after = np.linalg.slogdet(H)[1], {}
    for layer in range(1, layers + 1):
        W = rng.standard_normal((width, width))
        H = W @ H
        length = np.linalg.norm(H, axis=1) / width**0.5  # rows of mean square 1
        H /= length[:, None]
        log_det += np.linalg.slogdet(W)[1] - np.log(length).sum()
        after[layer] = np.log(width) - 2 * log_det / width
    ratio = stationary_soft_rank(width, steps=300, chains=8, seed=0).participation
    growth = (after[layers] - after[50]) / (layers - 50)
    assert growth == pytest.approx(float(gaussian_isometry_growth(width, participation=ratio)), abs=0.05)
    assert float(metrics.isometry_gap(torch.from_numpy(H.T))) < 0.5 * after[layers]


def log_gradient(depth, width, generator, *, orthogonal):
    """Logarithm of the norm of the loss's gradient at the first of `depth` weights of a linear net with batch norms."""

    def draw():
        W = torch.randn(width, width, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(W)[0] if orthogonal else W / width**0.5

    H = torch.randn(width, width, generator=generator, dtype=torch.float64)
    label = torch.randint(10, (width,), generator=generator)
    first = draw().requires_grad_()
    H = first @ H
    H = H / H.square().mean(1, keepdim=True).sqrt()
    for _ in range(depth - 1):
        H = draw() @ H
        H = H / H.square().mean(1, keepdim=True).sqrt()
    head = torch.randn(10, width, generator=generator, dtype=torch.float64) / width**0.5
    loss = torch.nn.functional.cross_entropy((head @ H).T, label)
    return float(torch.autograd.grad(loss, first)[0].norm().log())


def test_gradients_keep_their_size_with_depth_under_orthogonal_weights_and_grow_slowly_under_gaussian_ones():
    depths = (5, 20, 50, 100, 200)
    for name, orthogonal in (("bn-orthogonal-gradients", True), ("bn-gaussian-gradients", False)):
        generator = torch.Generator().manual_seed(0)
        runs = [[log_gradient(depth, 100, generator, orthogonal=orthogonal) for depth in depths] for _ in range(2)]
        assert_golden(name, np.mean(runs, 0))


# ------------------------------------------------------------ rows of an architecture


def architecture(**changed):
    base = {"depth": 6, "width": 128, "context": 6, "mlp_width": 256, "activation": "identity", "norm": "batchnorm"}
    return Architecture(**{**base, "placement": "post", "attention_branch": 0.0, "mlp_skip": 0.0, **changed})


@pytest.mark.parametrize(("width", "samples", "correlation"), [(128, 6, 0.5), (256, 10, 0.0)])
def test_rows_are_the_gaps_of_networks_with_real_batch_norms(width, samples, correlation):
    one = architecture(width=width, context=samples, correlation=correlation, mlp_width=2 * width)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(24):
        common = torch.randn(1, width, generator=generator)
        X = correlation**0.5 * common + (1 - correlation) ** 0.5 * torch.randn(samples, width, generator=generator)
        found = [float(metrics.orthogonality_gap(X))]
        for _ in range(one.depth):
            hidden = X @ torch.randn(width, 2 * width, generator=generator)
            X = hidden @ torch.randn(2 * width, width, generator=generator)
            X = torch.nn.functional.batch_norm(X, None, None, training=True)
            found.append(float(metrics.orthogonality_gap(X)))
        draws.append(found)
    rows = BATCHNORM.rows(one)
    assert {(row.metric, row.scope, row.site) for row in rows} == {("orthogonality_gap", "samples", "stream")}
    assert [row.value for row in rows] == pytest.approx(np.mean(draws, 0), rel=0.05)


def test_the_gap_of_centred_batches_has_a_floor():
    course = orthogonality_course(np.arange(400), width=10**9, samples=5, correlation=0.9)
    assert course[0] == pytest.approx(math.sqrt(4 / 5) * 0.9, rel=1e-3)
    assert course[-1] == pytest.approx(1 / math.sqrt(20), rel=1e-3)
    both = orthogonality_course(3, width=np.array([64, 128]), samples=5)
    assert both.tolist() == [float(orthogonality_course(3, width=d, samples=5)) for d in (64, 128)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"norm": "layernorm"}, "its norm is layernorm, post"),
        ({"placement": "pre"}, "its norm is batchnorm, pre"),
        ({"attention_branch": 1.0}, "it has attention"),
        ({"mlp_skip": 1.0}, "a skip of strength 1.0 leads past its MLP"),
        ({"activation": "relu"}, "its MLP has relu units"),
        ({"context": 128}, "its batch of 128 vectors"),
        ({"context": 2}, "its batch of 2 vectors"),
    ],
)
def test_it_says_why_it_has_nothing_to_say(changed, reason):
    assert BATCHNORM.fit(architecture()) > 0.9
    one = architecture(**changed)
    assert BATCHNORM.fit(one) == 0
    assert any(reason in said for said in BATCHNORM.reasons(one))
