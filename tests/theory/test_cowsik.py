"""Cowsik's exponents against networks that are run and differentiated; powers of causal averages against matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tests.theory.random_stack import cosine, states

from fullrank.architecture import Architecture
from fullrank.errors import TheoryError
from fullrank.theory.activations import ACTIVATIONS
from fullrank.theory.catalogue import THEORIES, ranked
from fullrank.theory.cesaro import causal_shares
from fullrank.theory.cowsik import COWSIK, angle_exponent, balanced_skip, exponents, gradient_exponent
from fullrank.theory.giorlandino_goldt import giorlandino_goldt
from fullrank.theory.slopes import mean_square_slope

# ------------------------------------------------------------ slopes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mean_square_slope_is_that_of_autograd_over_many_gaussians(activation):
    from tests.theory.random_stack import _PHI

    z = torch.from_numpy(np.linspace(-10, 10, 400_001))
    weight = torch.exp(-z * z / 2) / torch.exp(-z * z / 2).sum()
    q = np.array([1e-6, 0.3, 2.0, 16.0, 900.0])
    for at in q:
        u = (math.sqrt(at) * z).requires_grad_()
        (slope,) = torch.autograd.grad(_PHI[activation](u).sum(), u)
        wanted = float((weight * slope.square()).sum())
        assert float(mean_square_slope(activation, at)) == pytest.approx(wanted, abs=2e-5)
    many = np.repeat(q, 400).reshape(5, 400)  # enough for the other order of summation
    np.testing.assert_allclose(mean_square_slope(activation, many)[:, 7], mean_square_slope(activation, q), rtol=1e-12)


def test_an_activation_without_a_slope_is_refused_by_name():
    with pytest.raises(TheoryError, match="'swish' has no slope here: there are identity, relu"):
        mean_square_slope("swish", 1.0)


# ------------------------------------------------------------ powers of a causal average


@pytest.mark.parametrize("T", [40, 400])
def test_shares_of_a_causal_average_are_those_of_the_matrices(T):
    J = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    found, half = causal_shares(T, 6), T // 2
    power = np.eye(T)
    for k in range(7):
        columns = np.square(power).sum(0)
        wanted = (
            columns.mean(),
            columns[half:].mean(),
            power.var(0, ddof=1).sum(),
            power[half:].var(0, ddof=1).sum(),
        )
        for seen, one in zip((share[k] for share in found), wanted, strict=True):
            assert abs(seen - one) <= 0.03 * one + 3e-6
        power = J @ power


# ------------------------------------------------------------ the paper's block, written out here


def run_block(x, alphas, skips, sigma_w, sigma_v, generator):
    """Pre-LN attention with logits of width-d queries, then a tanh MLP of one hidden layer of the same width."""
    d = x.shape[-1]

    def weight(std):
        return torch.randn(d, d, generator=generator, dtype=x.dtype) * std / math.sqrt(d)

    n = torch.nn.functional.layer_norm(x, (d,))
    logits = (n @ weight(1.0)) @ (n @ weight(1.0)).mT / math.sqrt(d)
    x = skips[0] * x + alphas[0] * logits.softmax(-1) @ n @ weight(sigma_v)
    n = torch.nn.functional.layer_norm(x, (d,))
    return skips[1] * x + alphas[1] * torch.tanh(n @ weight(sigma_w)) @ weight(sigma_w)


def near_tokens(count, width, rho, generator):
    shared, own = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (1, count))
    return math.sqrt(rho) * shared + math.sqrt(1 - rho) * own


def measured(count, width, depth, alphas, skips, sigma_w, sigma_v, draws=12):
    """Mean and standard error of both exponents."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(draws):
        start = near_tokens(count, width, 0.998, generator).requires_grad_()
        x = start
        for _ in range(depth):
            x = run_block(x, alphas, skips, sigma_w, sigma_v, generator)
        R = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        (g,) = torch.autograd.grad((R / R.norm() * x).sum(), start)
        angle = math.log((1 - cosine(x.detach()[None])) / (1 - cosine(start.detach()[None])))
        found.append((angle / depth, float(g.square().sum().log()) / depth))
    values = np.array(found)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(draws)


@pytest.mark.parametrize(("count", "width", "depth"), [(12, 96, 3), (32, 160, 6)])
@pytest.mark.parametrize(
    ("alphas", "sigma_w", "sigma_v", "balanced"), [((0.8, 0.9), 2.0, 1.0, False), ((0.4, 0.7), 3.5, 1.3, True)]
)
def test_both_exponents_are_those_of_a_simulated_stack_near_collapse(
    count, width, depth, alphas, sigma_w, sigma_v, balanced
):
    skips = [float(one) for one in balanced_skip(alphas)] if balanced else [1.0, 1.0]
    named = {"weight_std": sigma_w, "value_gain": sigma_v**2, "attention_skip": skips[0], "mlp_skip": skips[1]}
    seen, error = measured(count, width, depth, alphas, skips, sigma_w, sigma_v)
    q, angle = 1.0, 0.0
    s2 = sigma_w**2
    z = np.random.default_rng(0).standard_normal(200_000)
    v = s2 * np.mean(np.tanh(sigma_w * z) ** 2)
    for _ in range(depth):
        angle += float(angle_exponent(*alphas, size=q, **named)) / depth
        q = skips[1] ** 2 * (skips[0] ** 2 * q + alphas[0] ** 2 * sigma_v**2) + alphas[1] ** 2 * v
    gradient = float(gradient_exponent(*alphas, depth=depth, tokens=count, **named))
    for one, wanted, wrong in zip(seen, (angle, gradient), error, strict=True):
        assert abs(one - wanted) < 4 * wrong + 0.015  # means of logarithms; and 1/width


def test_arrays_make_a_map_and_agree_with_single_points():
    alpha, sigma = np.linspace(0.1, 0.9, 4)[:, None], np.linspace(1.0, 4.0, 5)
    options = {"attention_skip": balanced_skip(alpha), "mlp_skip": balanced_skip(alpha)}
    angle = angle_exponent(alpha, alpha, weight_std=sigma, **options)
    gradient = gradient_exponent(alpha, alpha, weight_std=sigma, depth=7, tokens=16, **options)
    assert angle.shape == gradient.shape == (4, 5)
    skip = float(balanced_skip(alpha[2, 0]))
    one = {"weight_std": sigma[3], "attention_skip": skip, "mlp_skip": skip}
    assert float(angle_exponent(alpha[2, 0], alpha[2, 0], **one)) == pytest.approx(angle[2, 3], rel=1e-12)
    found = gradient_exponent(alpha[2, 0], alpha[2, 0], depth=7, tokens=16, **one)
    assert float(found) == pytest.approx(gradient[2, 3], rel=1e-12)
    assert np.all(np.diff(angle, axis=1)[2:] > 0)  # larger weights: towards chaos
    assert (angle < 0).any()
    assert math.isinf(float(angle_exponent(1.0, 0.0, weight_std=1.0, attention_skip=0.0)))


# ------------------------------------------------------------ of an architecture


def test_the_papers_block_as_an_architecture_has_the_papers_exponents():
    d, sigma_w = 400, 1.7
    std = sigma_w / math.sqrt(d)
    one = Architecture(
        depth=1,
        width=d,
        mlp_width=d,
        activation="tanh",
        std_v=d**-0.5,
        std_o=d**-0.5,
        std_up=std,
        std_down=std,
        context=24,
        correlation=0.99,
        attention_branch=0.6,
        mlp_branch=0.8,
    )
    found = exponents(one)
    assert float(found.angle) == pytest.approx(float(angle_exponent(0.6, 0.8, weight_std=sigma_w)), rel=1e-9)
    deep = exponents(one, depth=np.array([1, 9]))
    for place, depth in enumerate((1, 9)):
        wanted = gradient_exponent(0.6, 0.8, weight_std=sigma_w, depth=depth, tokens=24)
        assert float(deep.gradient[place]) == pytest.approx(float(wanted), rel=1e-9)
        assert float(exponents(one.with_(depth=depth)).angle) == pytest.approx(float(deep.angle[place]), rel=1e-12)


_KINDS = [
    {"placement": "pre", "mask": "causal", "activation": "gelu", "gated": True},
    {"placement": "post", "mask": "full", "activation": "relu"},
    {"placement": "post", "mask": "causal", "activation": "silu"},
    {"placement": "peri", "mask": "full", "activation": "gelu"},
    {"placement": "pre", "mask": "full", "activation": "silu", "gated": True, "parallel": True},
    {"placement": "none", "norm": "none", "mask": "full", "activation": "tanh"},
]


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: "-".join(str(one) for one in kind.values()))
@pytest.mark.parametrize(("width", "tokens", "depth"), [(64, 24, 3), (144, 40, 5)])
def test_exponents_of_an_architecture_are_those_of_random_stacks_by_autograd(kind, width, tokens, depth):
    unit = width**-0.5
    one = Architecture(
        depth=depth,
        width=width,
        heads=4,
        mlp_width=2 * width,
        std_q=unit,
        std_k=unit,
        std_v=1.2 * unit,
        std_o=unit,
        std_up=1.5 * unit,
        std_gate=unit,
        std_down=(2 * width) ** -0.5,
        context=tokens,
        correlation=0.995,
        attention_branch=0.8,
        mlp_branch=0.7,
        std_bias_up=0.2,
        std_bias_mlp=0.1,
        **kind,
    )
    found, draws = [], 10
    for seed in range(draws):
        generator = torch.Generator().manual_seed(100 + seed)
        start = near_tokens(tokens, width, 0.995, generator)[None].requires_grad_()
        last = states(one, seed=seed, start=start)[-1]
        R = torch.randn(last.shape, generator=generator, dtype=torch.float64)
        (g,) = torch.autograd.grad((R * last).sum(), start)
        half = tokens // 2
        angle = math.log((1 - cosine(last.detach())) / (1 - cosine(start.detach())))
        gains = [math.log(float(g[:, at:].square().sum() / R[:, at:].square().sum())) for at in (0, half)]
        found.append([angle / depth, gains[0] / depth, gains[1] / depth])
    values = np.array(found)
    error = values.std(0, ddof=1) / math.sqrt(draws)
    wanted = exponents(one)
    for seen, expected, wrong in zip(
        values.mean(0), (wanted.angle, wanted.gradient, wanted.gradient_late), error, strict=True
    ):
        assert abs(seen - float(expected)) < 4 * wrong + 0.02


def test_a_map_over_fields_agrees_with_single_architectures():
    one = Architecture(depth=5, width=256, heads=4, mask="causal", context=64, correlation=0.98)
    scale, tokens = np.array([0.1, 1.0]), np.array([[16], [64], [200]])
    found = exponents(one, residual_scale=scale, context=tokens)
    assert found.angle.shape == found.gradient.shape == (3, 2)
    single = exponents(one.with_(residual_scale=1.0, context=200))
    assert float(single.angle) == pytest.approx(found.angle[2, 1], rel=1e-9)
    assert float(single.gradient) == pytest.approx(found.gradient[2, 1], rel=1e-9)


# ------------------------------------------------------------ rows


def test_rows_stand_where_examine_puts_them_and_agree_with_each_other():
    one = Architecture(depth=6, width=128, heads=4, mask="causal", context=48, correlation=0.97)
    rows = {(row.metric, row.scope, row.layer): row for row in COWSIK.rows(one)}
    assert {row.metric for row in rows.values()} == set(COWSIK.gives)
    assert rows["gradient_exponent", "late", 6].site == rows["angle_exponent", "all", 6].site == "gradient"
    assert rows["angle_exponent", "all", 6].part == "out"
    full = one.with_(mask="full")
    rows = {(row.metric, row.scope, row.layer): row.value for row in COWSIK.rows(full)}
    rate = math.log((1 - rows["similarity", "all", 6]) / (1 - rows["similarity", "all", 0])) / 6
    assert rate == pytest.approx(rows["angle_exponent", "all", 6], rel=1e-9)


def test_it_says_nothing_of_tokens_that_are_not_alike_and_less_the_less_alike_they_are():
    one = Architecture(depth=6, width=128, heads=4)
    assert COWSIK.fit(one) == 0
    assert "mean cosine of 0" in COWSIK.reasons(one)[0]
    assert COWSIK.fit(one.with_(correlation=0.9)) < COWSIK.fit(one.with_(correlation=0.99)) < 1
    assert COWSIK.fit(one.with_(correlation=0.99, window=16)) == 0


def test_it_never_comes_before_the_map_that_it_linearises():
    fields = itertools.product(
        [{"width": 8}, {"width": 512}],
        [{"heads": 1}, {"heads": 8}],
        [{"context": 3}, {"context": 256}],
        [{"placement": "pre"}, {"placement": "post"}, {"placement": "none", "norm": "none"}],
        [{"mask": "full"}, {"mask": "causal"}, {"window": 2}],
        [{"positions": "learned"}, {"positions": "alibi"}, {"positions": "relative"}],
    )
    for parts in fields:
        merged = {name: value for part in parts for name, value in part.items()}
        one = Architecture(depth=2, correlation=1.0, **merged)
        assert COWSIK.fit(one) <= giorlandino_goldt.fit(one) * (1 + 1e-12)
        first = ranked(THEORIES, one)[0][1]
        assert first.key != "cowsik"


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_stream_without_norms_may_grow_beyond_any_number_and_exponents_stay_finite(mask):
    one = Architecture(depth=300, width=128, heads=4, norm="none", placement="none", activation="relu", mask=mask)
    wild = one.with_(correlation=0.99, mlp_std=0.6)  # 1e60 after some 25 blocks
    short, long = exponents(wild.with_(depth=10)), exponents(wild)
    assert float(long.angle) == pytest.approx(float(short.angle), abs=0.01)
    assert float(long.gradient) == pytest.approx(float(short.gradient), rel=0.1)
    assert all(math.isfinite(row.value) for row in COWSIK.rows(wild))
    still = one.with_(placement="peri", norm="layernorm", value_std=0.0, correlation=0.99)  # a norm of nothing
    assert all(math.isfinite(row.value) for row in COWSIK.rows(still))
