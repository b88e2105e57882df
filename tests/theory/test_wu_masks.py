"""Masks as graphs, and the rates at which they draw tokens together, against searches and layers really run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tests.golden import assert_golden

from fullrank import metrics
from fullrank.errors import TheoryError
from fullrank.theory.noci import correlation
from fullrank.theory.wu_masks_layernorm import (
    bound_rate,
    causal_exponent,
    layers_at_rate,
    layers_until,
    normalised_spread,
    second_eigenvalue,
    soft_logit_spread,
    spread,
    uniform_attention,
)
from fullrank.theory.wu_masks_layernorm_graphs import MASKS, attention_mask, mask_graph
from fullrank.theory.wu_masks_layernorm_positions import alibi_peak, alibi_rollout

# the card's four, in its order
FOUR = {"full": {}, "causal": {}, "causal-window": {"reach": 2}, "window": {"reach": 2}}


def four(count):
    return [attention_mask(name, count, **reach) for name, reach in FOUR.items()]


def mu(x):
    return float(np.linalg.norm(x - x.mean(-2, keepdims=True)))


# ------------------------------------------------------------ graphs


def test_radius_and_centres_meet_their_golden_numbers():
    full, causal, one_sided, two_sided = (mask_graph(mask) for mask in four(32))
    graphs = (full, causal, two_sided, one_sided)
    assert_golden("wu-mask-radius", [g.radius for g in graphs] + [int(g.centres.sum()) for g in graphs])
    assert [g.strongly_connected for g in graphs] == [True, False, True, False]
    assert all(g.quasi_strongly_connected for g in graphs)


def layers_to_hear(mask):
    """Layers until query i has heard of key j, by powers of the mask; infinite where it never does."""
    count = len(mask)
    heard, layers = np.eye(count, dtype=bool), np.where(np.eye(count, dtype=bool), 0.0, np.inf)
    for step in range(1, count + 1):
        heard = (mask.astype(int) @ heard.astype(int)) > 0
        layers = np.where(heard, np.minimum(layers, step), layers)
    return layers


@pytest.mark.parametrize("count", [7, 24])
@pytest.mark.parametrize("density", [0.05, 0.12, 0.4])
def test_graphs_are_what_powers_of_the_mask_say(count, density):
    for seed in range(20):
        mask = np.random.default_rng(seed).random((count, count)) < density
        mask |= np.eye(count, dtype=bool)
        slowest = layers_to_hear(mask).max(0)  # of each key: until all have heard of it
        graph = mask_graph(mask)
        assert np.array_equal(graph.centres, np.isfinite(slowest))
        assert graph.strongly_connected == bool(np.isfinite(slowest).all())
        assert graph.radius == (int(slowest.min()) if np.isfinite(slowest).any() else None)


def test_a_node_that_nobody_hears_has_no_centre_behind_it_but_one_that_all_hear_is_one_without_a_self_loop():
    apart = np.eye(3, dtype=bool)
    graph = mask_graph(apart)
    assert (graph.radius, graph.quasi_strongly_connected) == (None, False)
    ring = np.roll(np.eye(5, dtype=bool), 1, axis=1)  # every query sees the next key alone
    assert mask_graph(ring).radius == 4
    assert mask_graph(ring).strongly_connected


@pytest.mark.parametrize("count", [6, 19])
def test_masks_are_what_their_names_say(count):
    made = {name: attention_mask(name, count, reach=2, dilation=3, marked=2, drawn=1, seed=4) for name in MASKS}
    for i, j in itertools.product(range(count), repeat=2):
        assert made["full"][i, j]
        assert made["causal"][i, j] == (j <= i)
        assert made["window"][i, j] == (abs(i - j) <= 2)
        assert made["causal-window"][i, j] == (i - 2 <= j <= i)
        assert made["dilated"][i, j] == (abs(i - j) in (0, 3, 6))
        assert made["prefix"][i, j] == (j <= i or j < 2)
    inside = made["window"] | (np.arange(count) < 2) | (np.arange(count) < 2)[:, None]
    extra = made["big-bird"] & ~inside
    assert (made["big-bird"] | inside).sum() == made["big-bird"].sum()
    assert extra.sum(1).max() <= 1


def test_first_tokens_that_all_see_are_the_centres_of_a_prefix():
    graph = mask_graph(attention_mask("prefix", 12, marked=3))
    assert np.flatnonzero(graph.centres).tolist() == [0, 1, 2]
    assert graph.radius == 1


def test_a_mask_of_thousands_of_tokens_is_looked_at_in_little_time_and_memory():
    graph = mask_graph(attention_mask("window", 2000, reach=2))
    assert graph.radius == math.ceil(1999 / 4)
    assert mask_graph(attention_mask("causal-window", 2000, reach=16)).radius == math.ceil(1999 / 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: attention_mask("sliding", 4), "mask='sliding' is unknown: there are full"),
        (lambda: attention_mask("window", 4, reach=-1), "reach=-1 makes no mask: 0 or more"),
        (lambda: mask_graph(np.ones((2, 3), bool)), r"shape \(2, 3\) must be boolean, of shape \(queries, keys\)"),
        (lambda: mask_graph(np.ones((2, 2))), "mask of float64"),
        (lambda: mask_graph(np.array([[True, False], [False, False]])), "query 1 of the mask sees no key"),
        (lambda: second_eigenvalue(np.ones((2, 2))), "row-stochastic"),
        (lambda: spread(np.ones((2, 3)), 1), r"attention of shape \(2, 3\) must be square"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_sentence(call, says):
    with pytest.raises(TheoryError, match=says):
        call()


# ------------------------------------------------------------ rates


def test_second_eigenvalues_meet_their_golden_numbers():
    assert_golden("wu-mask-lambda2", [second_eigenvalue(uniform_attention(mask)) for mask in four(32)])


@pytest.mark.parametrize("count", [9, 30])
def test_second_eigenvalues_are_those_of_the_whole_matrix(count):
    rng = np.random.default_rng(count)
    for density in (0.1, 0.3, 0.8):
        mask = (rng.random((count, count)) < density) | np.eye(count, dtype=bool)
        for attention in (uniform_attention(mask), uniform_attention(mask | mask.T)):
            moduli = np.sort(np.abs(np.linalg.eigvals(attention)))
            assert second_eigenvalue(attention) == pytest.approx(moduli[-2], abs=1e-6)
        weights = mask * rng.random((count, count))
        weights /= weights.sum(1, keepdims=True)
        assert second_eigenvalue(weights) == pytest.approx(np.sort(np.abs(np.linalg.eigvals(weights)))[-2], abs=1e-6)


@pytest.mark.parametrize("count", [1100, 1500])
def test_large_masks_take_other_solvers_to_the_same_number(count):
    narrow = second_eigenvalue(uniform_attention(attention_mask("window", count, reach=2)))
    # of a random walk on a path, with steps of mean square 2: the slowest mode is a half wave
    assert 1 - narrow == pytest.approx((math.pi / count) ** 2, rel=0.02)
    mask = attention_mask("big-bird", count, reach=2, marked=1, drawn=3, seed=1)
    for one in (mask, mask | mask.T):
        attention = uniform_attention(one)
        x = np.random.default_rng(0).standard_normal((count, 8))
        falls = []
        for _ in range(40):
            x = attention @ x
            falls.append(mu(x))
        assert second_eigenvalue(attention) == pytest.approx((falls[39] / falls[29]) ** 0.1, rel=0.02)


def test_two_groups_that_hear_nothing_of_each_other_never_agree():
    apart = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool))
    attention = uniform_attention(apart)
    assert second_eigenvalue(attention) == pytest.approx(1.0)
    assert layers_until(attention, fall=0.1) == math.inf
    assert second_eigenvalue(np.ones((1, 1))) == 0.0


@pytest.mark.parametrize("fall", [1e-2, 1e-6])
@pytest.mark.parametrize("count", [12, 32])
def test_layers_until_are_those_of_the_spread_run_layer_by_layer(count, fall):
    for mask in four(count):
        attention = uniform_attention(mask)
        course = spread(attention, 1500)
        assert layers_until(attention, fall=fall) == np.flatnonzero(course <= fall * course[0])[0]


def test_layers_until_tokens_agree_meet_their_golden_numbers():
    found = [layers_until(uniform_attention(mask), fall=1e-6) for mask in four(32)]
    assert_golden("wu-mask-layers", found)
    rng = np.random.default_rng(0)
    run = []
    for mask in four(32):
        x = rng.standard_normal((32, 64))
        limit, layers = 1e-6 * mu(x), 0
        while mu(x) > limit:
            x, layers = uniform_attention(mask) @ x, layers + 1
        run.append(layers)
    assert_golden("wu-mask-layers", run)


def test_layers_at_the_rate_leave_out_the_plateau_of_a_one_sided_window():
    one_sided = uniform_attention(attention_mask("causal-window", 32, reach=2))
    at_rate = float(layers_at_rate(1e-6, second_eigenvalue(one_sided)))
    assert at_rate == pytest.approx(math.log(1e6) / math.log(2))
    assert layers_until(one_sided, fall=1e-6) > 2 * at_rate
    assert layers_at_rate([0.5, 0.25], [0.5, 1.0]).tolist() == [1.0, math.inf]


def test_the_theorem_orders_masks_and_bounds_nothing_that_is_seen():
    assert float(bound_rate(0.191, 8)) == pytest.approx(2.2e-7, rel=0.02)
    assert float(bound_rate(0.0295, 1)) == pytest.approx(0.0295)
    least, radius = np.array([0.3, 0.2]), np.array([2, 5])
    expected = [1 - (1 - e**r) ** (1 / r) for e, r in zip(least, radius, strict=True)]
    assert bound_rate(least, radius) == pytest.approx(expected, rel=1e-9)
    seen = 1 - second_eigenvalue(uniform_attention(attention_mask("window", 32, reach=2)))
    assert seen > 1e4 * float(bound_rate(0.191, 8))


# ------------------------------------------------------------ random stacks


def orthogonal(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def softmax(logits, mask):
    weights = np.exp(np.where(mask, logits - logits.max(1, keepdims=True), -np.inf))
    return weights / weights.sum(1, keepdims=True)


def stack(mask, layers, seed, *, width=64, norm=False, gaussian=False, gain=1.0):
    """μ over layers of fresh random single-head attention, and each layer's self-weights; float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(mask), width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found, diagonals = [mu(x)], []
    for _ in range(layers):
        q, k = (rng.standard_normal((width, width)) / width**0.5 for _ in "qk")
        attention = softmax(gain * (x @ q) @ (x @ k).T / width**0.5, mask)
        v = rng.standard_normal((width, width)) / width**0.5 if gaussian else orthogonal(rng, width)
        x = attention @ x @ v
        if norm:
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        found.append(mu(x))
        diagonals.append(np.diagonal(attention))
    return np.array(found), np.array(diagonals)


AT = {
    "wu-random-san-causal": (1, (0, 1, 2, 5, 10, 20, 50)),
    "wu-random-san-unidirectional": (2, (0, 1, 2, 5, 10, 20, 50)),
    "wu-random-san-bidirectional": (3, (0, 1, 2, 5, 10, 20, 50, 100, 400)),
}


@pytest.mark.parametrize("name", AT)
def test_the_spread_of_uniform_attention_is_that_of_random_stacks(name):
    index, layers = AT[name]
    mask = four(32)[index]
    law = spread(uniform_attention(mask), layers[-1])
    run = stack(mask, layers[-1], seed=0)[0]
    assert_golden(name, law[list(layers)])
    assert_golden(name, run[list(layers)])
    above = run > 1e-10  # of rounding
    assert law[above] == pytest.approx(run[above], rel=0.35)


def test_full_attention_leaves_only_what_small_logits_leave():
    mask = np.ones((32, 32), bool)
    runs = [stack(mask, 2, seed)[0] for seed in range(6)]
    assert_golden("wu-random-san-complete", np.median(runs, 0))
    # tokens of norm 1 in 64 dimensions: the participation ratio of 31 deviations
    first = float(soft_logit_spread(31**0.5, tokens=32, logit_std=1 / 64, participation=31 * 64 / (31 + 64)))
    # what a layer leaves has the spectrum of Δ M ΔᵀΔ
    rng = np.random.default_rng(0)
    before, weights = (rng.standard_normal(shape) for shape in ((31, 64), (64, 64)))
    sigma = np.linalg.svd(before @ weights @ before.T @ before, compute_uv=False) ** 2
    left = sigma.sum() ** 2 / (sigma**2).sum()
    second = float(soft_logit_spread(first, tokens=32, logit_std=1 / 64, participation=left))
    assert_golden("wu-random-san-complete", [31**0.5, first, second])


@pytest.mark.parametrize(("count", "width"), [(12, 24), (40, 32)])
def test_the_cubic_law_of_small_logits_is_one_layer_of_full_attention(count, width):
    rng = np.random.default_rng(count)
    scale = rng.uniform(0.3, 1.0, (count, 1))
    base = 0.5 * rng.standard_normal(width) / width**0.5  # a common part, which must not matter
    x = scale * rng.standard_normal((count, width)) / width**0.5
    x, strength = base + x, 0.01
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    law = soft_logit_spread(mu(x), tokens=count, logit_std=strength, participation=sigma.sum() ** 2 / (sigma**2).sum())
    squares = []
    for _ in range(400):
        logits = strength * x @ rng.standard_normal((width, width)) @ x.T
        squares.append(mu(softmax(logits, np.ones((count, count), bool)) @ x) ** 2)
    assert float(law) == pytest.approx(np.mean(squares) ** 0.5, rel=0.08)


def test_the_exponent_of_causal_attention_is_the_mean_logarithm_of_a_self_weight():
    mask = attention_mask("causal", 32)
    run, diagonals = stack(mask, 45, seed=0)
    layers = np.arange(15, 41)
    slope = np.polyfit(layers, np.log(run[layers]), 1)[0]
    predicted = float(causal_exponent(diagonals))
    assert_golden("wu-causal-exponent", [slope, predicted])
    uniform = np.diagonal(uniform_attention(mask))
    assert float(causal_exponent(np.tile(uniform, (3, 1)))) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("count", [6, 14])
def test_the_exponent_holds_for_attention_of_any_sharpness(count):
    """Products of causal matrices with weights of every size, over so many layers that the largest mean wins."""
    rng = np.random.default_rng(count)
    mask = attention_mask("causal", count)
    x, diagonals, sizes = rng.standard_normal((count, 8)), [], 0.0
    for _ in range(1500):
        attention = softmax(2.0 * rng.standard_normal((count, count)), mask)
        x = attention @ x
        x -= x[0]  # the first token never moves: what all have of it is no spread
        sizes += math.log(np.linalg.norm(x))
        x /= np.linalg.norm(x)
        diagonals.append(np.diagonal(attention))
    assert sizes / 1500 == pytest.approx(float(causal_exponent(np.array(diagonals))), abs=0.03)
    assert causal_exponent(np.array([diagonals, diagonals])).shape == (2,)


# ------------------------------------------------------------ with a norm


@pytest.mark.parametrize("gaussian", [False, True])
def test_a_norm_does_not_keep_tokens_apart_whatever_the_random_values(gaussian):
    full, causal = (attention_mask(name, 32) for name in ("full", "causal"))
    found = [
        stack(full, 5, 0, norm=True, gaussian=gaussian)[0][5],
        stack(causal, 100, 0, norm=True, gaussian=gaussian)[0][100],
    ]
    assert_golden("wu-ln-still-collapses", found)


def test_with_a_norm_a_window_draws_tokens_together_at_the_rate_of_attention_alone():
    mask = attention_mask("window", 32, reach=2)
    law = normalised_spread(uniform_attention(mask), 400)
    runs = np.array([stack(mask, 400, seed, norm=True)[0] for seed in range(2)])
    assert_golden("wu-ln-window-orthogonal", law[[200, 400]])
    assert_golden("wu-ln-window-orthogonal", runs[0][[200, 400]])
    assert law[[20, 100, 400]] == pytest.approx(runs.mean(0)[[20, 100, 400]], rel=0.4)


def test_with_gaussian_values_a_window_draws_them_together_as_well():
    mask = attention_mask("window", 32, reach=2)
    runs = np.array([stack(mask, 400, seed, norm=True, gaussian=True)[0] for seed in range(5)])
    # one direction wins in a product of Gaussians, and what a run has along it scatters: the middle one of five
    assert_golden("wu-ln-window-gaussian", np.median(runs, 0)[[200, 400]])


def test_collapsed_tokens_stop_at_the_rounding_of_float32_and_not_at_zero():
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.layer_norm(torch.randn(64, 256, generator=generator), (256,))
    plateau = []
    for layer in range(20):
        written = torch.zeros_like(x)
        for _ in range(4):
            q, k, v = (0.02 * torch.randn(256, 64, generator=generator) for _ in "qkv")
            weights = ((x @ q) @ (x @ k).T / 8).softmax(1)
            written += weights @ x @ v @ (0.02 * torch.randn(64, 256, generator=generator))
        x = torch.nn.functional.layer_norm(written, (256,))
        if layer >= 10:
            plateau.append(float(metrics.residual(x[None])))
    assert_golden("wu-float-floor", float(np.mean(plateau)))
    assert max(plateau) < metrics.floor(torch.float32)


def test_a_skip_with_a_norm_behind_it_delays_collapse_and_does_not_prevent_it():
    """Odds of the common part double a layer, for values that keep lengths; at std .02 they hardly move."""
    law = correlation(np.array([2, 11]), tokens=64, attention_branch=1.0)
    assert_golden("wu-postln-skip-collapses", np.sqrt((1 - 1 / 64) * (1 - law)))
    runs = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, found = rng.standard_normal((64, 256)), []
        for _ in range(11):
            written = np.zeros_like(x)
            for _ in range(4):
                q, k = (0.02 * rng.standard_normal((256, 64)) for _ in "qk")
                v, o = rng.standard_normal((256, 64)) / 16, rng.standard_normal((64, 256)) / 16
                written += softmax((x @ q) @ (x @ k).T / 8, np.ones((64, 64), bool)) @ (x @ v) @ o
            x = x + written
            x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
            found.append(mu(x) / np.linalg.norm(x))
        runs.append(found)
    assert_golden("wu-postln-skip-collapses", np.mean(runs, 0)[[1, 10]])


# ------------------------------------------------------------ where content comes from


@pytest.mark.parametrize(("layers", "slope"), [(3, 0.5), (20, 0.25)])
def test_the_rollout_of_attention_that_falls_off_is_a_product_of_its_layers(layers, slope):
    count = 400
    back = np.arange(count)[:, None] - np.arange(count)
    attention = np.where(back >= 0, np.exp(-slope * np.abs(back)), 0.0)
    attention /= attention.sum(1, keepdims=True)
    product = np.linalg.matrix_power(attention, layers)[-1, ::-1]  # of the last query, by distance
    law = alibi_rollout(np.arange(count), layers=layers, slope=slope)
    assert law == pytest.approx(product, abs=1e-9)
    assert abs(int(np.argmax(product)) - float(alibi_peak(layers=layers, slope=slope))) <= 1
    assert law.sum() == pytest.approx(1.0)
