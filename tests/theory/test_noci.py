"""Noci's closed forms against networks that are really run, and against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden, golden

from fullrank.architecture import Architecture
from fullrank.theory.noci import (
    NOCI,
    balancing_temperature,
    correlation,
    correlation_limit,
    growth,
    growth_limit,
    layers_until,
    query_gradient,
    value_gradient,
)

# ------------------------------------------------------------ a network that is really run


def tokens_of(count, width, rho, generator):
    """Gaussian tokens of mean square 1 and expected cosine ρ."""
    shared = torch.randn(1, width, generator=generator, dtype=torch.float64)
    own = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return math.sqrt(rho) * shared + math.sqrt(1 - rho) * own


def cosine(x):
    unit = x / x.norm(dim=1, keepdim=True)
    count = len(x)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


def run(count, width, depth, branch, rho, generator, *, softmax=False, activation=None, gain=1.0):
    """Mean cosine before and after, and how much the squared size grew: X + α A X W, then Z + α φ(Z W) W."""

    def weight(variance=1.0):
        return torch.randn(width, width, generator=generator, dtype=torch.float64) * math.sqrt(variance / width)

    x = tokens_of(count, width, rho, generator)
    before = float(x.square().sum())
    for _ in range(depth):
        if softmax:
            logits = (x @ weight()) @ (x @ weight()).T / math.sqrt(width)
            mixed = logits.softmax(1) @ x
        else:
            mixed = x.mean(0, keepdim=True).expand_as(x)
        x = x + branch * mixed @ weight()
        hidden = x @ weight()
        x = x + branch * (hidden if activation is None else activation(hidden)) @ weight(gain)
    return cosine(x), float(x.square().sum()) / before


def mean_of(draws, *args, **options):
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([run(*args, generator, **options) for _ in range(draws)])
    return found.mean(0).tolist()


# ------------------------------------------------------------ golden numbers

L, T = 24, 32
BRANCH = 1 / math.sqrt(L)


def test_the_closed_form_meets_its_golden_numbers():
    rho = [float(correlation(L, tokens=T, attention_branch=BRANCH, correlation=at)) for at in (0.0, 0.2)]
    assert_golden("noci-closed-form-rho", rho)
    size = [float(growth(L, tokens=T, attention_branch=BRANCH, mlp_branch=BRANCH, correlation=at)) for at in (0.0, 0.2)]
    assert_golden("noci-closed-form-norm", size)
    layers = np.arange(1, 11)
    assert_golden("mtg-upscaled-skip-noci", correlation(layers, tokens=150, attention_branch=1.0, correlation=0.0))


def test_the_recursion_is_that_of_a_linear_network_and_not_of_a_relu_network():
    found = [mean_of(24, T, 128, L, BRANCH, rho)[0] for rho in (0.0, 0.2)]
    assert_golden("noci-simulated-uniform-linear", found)
    softened = mean_of(24, T, 128, L, BRANCH, 0.2, softmax=True)[0]
    assert_golden("noci-simulated-softmax-linear", softened)
    relu = [mean_of(16, T, 128, L, BRANCH, rho, activation=torch.relu, gain=2.0)[0] for rho in (0.0, 0.2)]
    assert_golden("noci-relu-breaks", relu)
    theory = correlation(L, tokens=T, attention_branch=BRANCH, correlation=np.array([0.0, 0.2]))
    assert np.all(np.array(relu) - theory > 2 * golden("noci-relu-breaks")["tolerance"])


def test_softmax_makes_the_norm_grow_faster_than_uniform_attention_does():
    grown = mean_of(8, T, 128, L, BRANCH, 0.0, softmax=True)[1]
    assert_golden("noci-softmax-norm", grown)
    assert grown > 1.1 * float(growth(L, tokens=T, attention_branch=BRANCH, mlp_branch=BRANCH))


# ------------------------------------------------------------ against networks, at two sizes


@pytest.mark.parametrize(("count", "width", "depth"), [(16, 96, 6), (48, 192, 12)])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_correlation_and_growth_are_those_of_a_simulated_network(count, width, depth, rho):
    branch, draws = 0.5, 24
    generator = torch.Generator().manual_seed(1)
    found = torch.tensor([run(count, width, depth, branch, rho, generator) for _ in range(draws)], dtype=torch.float64)
    error = found.std(0) / math.sqrt(draws)
    expected = (
        float(correlation(depth, tokens=count, attention_branch=branch, correlation=rho)),
        float(growth(depth, tokens=count, attention_branch=branch, mlp_branch=branch, correlation=rho)),
    )
    # the closed form is of the ratio of means, the simulation of a mean of ratios: 3 % more
    for seen, wanted, one in zip(found.mean(0).tolist(), expected, error.tolist(), strict=True):
        assert abs(seen - wanted) < 4 * one + 0.03 * wanted


def test_branches_that_shrink_with_depth_have_a_limit_below_one():
    deep = correlation(10**6, tokens=64, attention_branch=2 / math.sqrt(10**6), correlation=0.1)
    assert float(deep) == pytest.approx(float(correlation_limit(tokens=64, strength=2.0, correlation=0.1)), rel=1e-5)
    grown = growth(10**6, tokens=64, attention_branch=1e-3, mlp_branch=2e-3, correlation=0.1)
    limit = growth_limit(tokens=64, strength=1.0, mlp_strength=2.0, correlation=0.1)
    assert float(grown) == pytest.approx(float(limit), rel=1e-4)
    assert float(correlation(5000, tokens=64, attention_branch=1.0)) == 1.0  # unscaled: no overflow, and collapsed


def test_layers_until_undoes_the_closed_form():
    blocks = layers_until(0.99, tokens=128, attention_branch=0.7, correlation=0.05)
    there = correlation(blocks, tokens=128, attention_branch=0.7, correlation=0.05)
    assert float(there) == pytest.approx(0.99, rel=1e-9)
    assert float(layers_until(0.1, tokens=128, attention_branch=0.7, correlation=0.5)) == 0.0
    assert math.isinf(float(layers_until(0.9, tokens=128, attention_branch=0.0, correlation=0.5)))


# ------------------------------------------------------------ gradients


def jacobian_norms(count, width, rho, temperature, generator):
    """Squared Frobenius norms of ∂S/∂W_V and ∂S/∂W_Q at W_Q = 0 (uniform attention), by autograd."""
    x = tokens_of(count, width, rho, generator)
    x = x * math.sqrt(width) / x.norm(dim=1, keepdim=True)
    draw = [torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width) for _ in range(2)]
    query = torch.zeros(width, width, dtype=torch.float64)

    def output(w_q, w_v):
        logits = temperature * (x @ w_q) @ (x @ draw[0]).T / math.sqrt(width)
        return logits.softmax(1) @ x @ w_v

    # E_u ‖∇⟨u, S⟩‖² over Gaussian u is the squared norm of the Jacobian
    squares = []
    for _ in range(24):
        leaves = [query.clone().requires_grad_(), draw[1].clone().requires_grad_()]
        out = output(*leaves)
        u = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        squares.append([float(g.square().sum()) for g in torch.autograd.grad((out * u).sum(), leaves)])
    return torch.tensor(squares).mean(0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_meet_their_golden_numbers_by_autograd_and_by_formula(temperature):
    generator = torch.Generator().manual_seed(3)
    rhos = (0.0, 0.5, 0.9)
    found = torch.stack(
        [torch.stack([jacobian_norms(64, 64, rho, temperature, generator) for _ in range(6)]).mean(0) for rho in rhos]
    )
    assert_golden("noci-gradient-q", (found[:, 0] / temperature**2).tolist())
    assert_golden("noci-gradient-v", found[:, 1].tolist())
    formula = query_gradient(tokens=64, width=64, correlation=np.array(rhos), temperature=temperature)
    assert formula.tolist() == pytest.approx([temperature**2 * one for one in (8192, 2048, 81.92)])
    values = value_gradient(tokens=64, width=64, correlation=np.array(rhos))
    assert values.tolist() == pytest.approx([4096, 133120, 236339], rel=1e-3)


@pytest.mark.parametrize(("count", "width"), [(24, 48), (64, 96)])
def test_the_balancing_temperature_balances(count, width):
    tau = float(balancing_temperature(tokens=count, width=width, correlation=0.4))
    sizes = {"tokens": count, "width": width, "correlation": 0.4}
    assert query_gradient(**sizes, temperature=tau) == pytest.approx(value_gradient(**sizes))
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([jacobian_norms(count, width, 0.4, tau, generator) for _ in range(12)]).mean(0)
    assert 0.7 < float(draws[0] / draws[1]) < 1.4
    assert math.isinf(float(balancing_temperature(tokens=count, width=width, correlation=1.0)))


# ------------------------------------------------------------ arrays, and an architecture


def test_arrays_give_what_single_numbers_give():
    branches, rhos = np.linspace(0, 1, 5)[:, None], np.linspace(0, 0.9, 4)
    together = correlation(8, tokens=32, attention_branch=branches, correlation=rhos)
    alone = [[correlation(8, tokens=32, attention_branch=b, correlation=r) for r in rhos] for b in branches[:, 0]]
    assert together.shape == (5, 4)
    assert together == pytest.approx(np.array(alone, float))


def test_a_linear_architecture_without_norms_is_told_its_course():
    plain = Architecture(
        depth=12, width=64, norm="none", placement="none", activation="identity", mlp_width=64, context=32,
        std_v=64**-0.5, std_o=64**-0.5, std_q=0.0, correlation=0.1, correlation_stderr=0.01,
    )  # fmt: skip
    assert NOCI.fit(plain) == 1.0
    rows = NOCI.rows(plain)
    by_layer = {row.layer: row for row in rows if row.metric == "similarity"}
    expected = correlation(np.arange(13), tokens=32, attention_branch=1.0, correlation=0.1)
    assert [by_layer[layer].value for layer in range(13)] == pytest.approx(expected.tolist())
    assert by_layer[0].stderr == pytest.approx(0.01)
    assert {row.source for row in rows} == {"theory:noci"}
    assert NOCI.fit(plain.with_(norm="batchnorm", placement="post")) == 0.0
    gated = plain.with_(norm="layernorm", placement="pre", activation="gelu")
    assert 0 < NOCI.fit(gated) < 0.2
    assert NOCI.fit(plain.with_(attention_skip=0.0)) == 0.0
    assert NOCI.reasons(plain.with_(attention_skip=0.0)) == ("it has a branch without a skip",)


def stream_of(one, seed):
    """Mean squares of the stream, and its last cosine: uniform attention, linear MLP, branches and skips as given."""
    generator = torch.Generator().manual_seed(seed)

    def weight(rows, columns, std):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * std

    x = one.input_rms * tokens_of(one.context, one.width, one.correlation, generator)
    squares = [float(x.square().mean())]
    for _ in range(one.depth):
        read = x / x.square().mean(1, keepdim=True).sqrt() if one.placement == "pre" else x
        mixed = (
            read.mean(0, keepdim=True)
            @ weight(one.width, one.width, one.std_v)
            @ weight(one.width, one.width, one.std_o)
        )
        x = one.attention_skip * x + one.attention_branch * mixed
        if one.mlp_width:
            hidden = x @ weight(one.width, one.mlp_width, one.std_up)
            x = one.mlp_skip * x + one.mlp_branch * hidden @ weight(one.mlp_width, one.width, one.std_down)
        squares.append(float(x.square().mean()))
    return [*squares, cosine(x)]


@pytest.mark.parametrize("changed", [{}, {"mlp_width": 0}, {"correlation": 0.0, "mlp_skip": 1.0}])
@pytest.mark.parametrize(("width", "context"), [(64, 12), (96, 40)])
def test_without_a_norm_the_size_of_the_stream_is_that_of_a_network(width, context, changed):
    fields = {
        "depth": 5, "width": width, "norm": "none", "placement": "none", "activation": "identity", "mlp_width": 96,
        "context": context, "std_v": 0.1, "std_o": 0.13, "std_up": 0.08, "std_down": 0.07, "std_q": 0.0,
        "correlation": 0.4, "input_rms": 0.3, "attention_branch": 0.9, "mlp_branch": 0.8, "attention_skip": 0.9,
        "mlp_skip": 0.7,
    }  # fmt: skip
    one = Architecture(**{**fields, **changed})
    rms = {row.layer: row.value for row in NOCI.rows(one) if row.metric == "rms"}
    seen = torch.tensor([stream_of(one, seed) for seed in range(60)], dtype=torch.float64)[:, :-1]
    error = seen.std(0) / math.sqrt(len(seen))
    for layer in range(one.depth + 1):
        assert abs(float(seen[:, layer].mean()) - rms[layer] ** 2) < 4 * float(error[layer])
        assert float(error[layer]) < 0.1 * rms[layer] ** 2
    assert rms[0] == pytest.approx(0.3)


def test_the_size_is_that_of_the_growth_at_both_ends_of_what_correlations_can_be_and_stops_beyond_numbers():
    plain = Architecture(
        depth=6, width=64, norm="none", placement="none", activation="identity", mlp_width=64, context=8,
        std_v=64**-0.5, std_o=64**-0.5, std_up=64**-0.5, std_down=64**-0.5, mlp_branch=0.5,
    )  # fmt: skip
    for rho in (-1 / 7, 0.0, 0.5, 1.0):
        rows = NOCI.rows(plain.with_(correlation=rho))
        found = [row.value**2 for row in rows if row.metric == "rms"]
        wanted = growth(np.arange(7), tokens=8, attention_branch=1.0, mlp_branch=0.5, correlation=rho)
        assert found == pytest.approx(wanted.tolist())
    deep = NOCI.rows(plain.with_(depth=2000))
    assert 0 < sum(row.metric == "rms" for row in deep) < 2000
    assert all(math.isfinite(row.value) for row in deep)
    for changed in ({"activation": "relu"}, {"std_bias_mlp": 0.1}, {"parallel": True}, {"gated": True}):
        assert {row.metric for row in NOCI.rows(plain.with_(**changed))} == {"similarity", "residual"}


@pytest.mark.parametrize("input_rms", [0.5, 2.0])
def test_a_branch_behind_a_norm_counts_the_more_the_smaller_the_stream_is(input_rms):
    one = Architecture(
        depth=1, width=128, mlp_width=0, context=24, std_v=128**-0.5, std_o=128**-0.5, std_q=0.0, correlation=0.2,
        input_rms=input_rms,
    )  # fmt: skip
    seen = torch.tensor([stream_of(one, seed)[-1] for seed in range(60)], dtype=torch.float64)
    rows = {row.layer: row.value for row in NOCI.rows(one) if row.metric == "similarity"}
    error = float(seen.std()) / math.sqrt(len(seen))
    assert abs(float(seen.mean()) - rows[1]) < 4 * error + 0.01
