"""Causal averaging and its late queries, against factorised matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fullrank.theory.mind_the_gap_causal import (
    causal_contrast_gain,
    cesaro_outlier,
    late_averaging,
    late_averaging_centred,
    late_edge,
    late_stable_rank,
    late_stable_rank_centred,
    uniform_stable_rank,
)
from golden import assert_golden

LOGNORMAL = math.sqrt(math.log(2))  # σ = 1


def averaging(tokens):
    return np.tri(tokens) / np.arange(1, tokens + 1)[:, None]


def causal(tokens, s, generator):
    A = np.tril(np.exp(generator.normal(0.0, s, (tokens, tokens))))
    return A / A.sum(-1, keepdims=True)


def rank_of(X):
    values = np.linalg.svd(X, compute_uv=False)
    return (values**4).sum() / values[0] ** 4


# ------------------------------------------------------------ golden numbers


def test_the_cesaro_outlier_is_that_of_its_golden_number_and_two_is_far_away():
    assert_golden("mtg-causal-s1", cesaro_outlier(np.array([50, 1000])))
    assert 1.89 < float(cesaro_outlier(1e6)) < 1.9
    assert float(cesaro_outlier(1e300)) < 2
    assert np.all(np.diff(cesaro_outlier(np.geomspace(4, 1e12, 50))) > 0)


def test_over_all_rows_the_stable_rank_hides_what_late_queries_show():
    for tokens in (50, 200, 1000):
        assert_golden("mtg-causal-sr", float(uniform_stable_rank(tokens)))
    assert_golden("mtg-causal-late", late_stable_rank(tokens=np.array([64, 256, 1024])))
    assert_golden("mtg-causal-late-centred", late_stable_rank_centred(tokens=np.array([64, 256, 1024])))


# ------------------------------------------------------------ averaging alone


@pytest.mark.parametrize("tokens", [8, 50, 400])
def test_singular_values_of_averaging_are_those_of_the_matrix(tokens):
    U = averaging(tokens)
    s1 = np.linalg.norm(U, 2)
    assert float(cesaro_outlier(tokens)) == pytest.approx(s1, abs=2e-4 if tokens < 50 else 5e-6)
    values = np.linalg.svd(U, compute_uv=False)
    assert float(uniform_stable_rank(tokens)) == pytest.approx((values**4).sum() / s1**4, rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 300])
@pytest.mark.parametrize("after", [0.5, 0.25])
def test_late_rows_of_averaging_keep_their_singular_values_at_every_context(tokens, after):
    U = averaging(tokens)[int(after * tokens) :]
    orders = np.array([1, 2, 3])
    values = np.linalg.svd(U, compute_uv=False)[:3]
    np.testing.assert_allclose(late_averaging(orders, tokens=tokens, after=after), values, rtol=5e-3)
    values = np.linalg.svd(U - U.mean(0), compute_uv=False)[:3]
    np.testing.assert_allclose(late_averaging_centred(orders, tokens=tokens, after=after), values, rtol=6e-3)
    # Σ s⁴ over all of them is what `late_stable_rank` takes for it
    exact = np.sum(late_averaging(np.arange(1, 400), after=after) ** 4)
    assert exact == pytest.approx(2 * (-math.log(after) - 1 + after), rel=1e-6)


# ------------------------------------------------------------ with randomness, at two sizes


@pytest.mark.parametrize("tokens", [128, 384])
def test_the_bulk_of_late_rows_ends_where_the_variance_profile_says(tokens):
    s = 0.4
    found = []
    for seed in range(4):
        A = causal(tokens, s, np.random.default_rng(seed))
        found.append(np.linalg.norm((A - averaging(tokens))[tokens // 2 :], 2))
    assert np.mean(found) == pytest.approx(float(late_edge(math.sqrt(math.expm1(s * s)), tokens=tokens)), rel=0.06)


@pytest.mark.parametrize(("tokens", "width"), [(128, 128), (384, 192)])
@pytest.mark.parametrize("s", [0.4, LOGNORMAL])
def test_late_stable_ranks_are_those_of_random_causal_layers(tokens, width, s):
    draws = 32 if tokens < 200 else 8
    with_mean, without = np.zeros(draws), np.zeros(draws)
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        A, W = causal(tokens, s, generator), generator.normal(size=(tokens, width))
        with_mean[seed] = rank_of((A @ W)[tokens // 2 :])
        without[seed] = rank_of(((A - averaging(tokens)) @ W)[tokens // 2 :])
    ratio, deviation = tokens / width, math.sqrt(math.expm1(s * s))
    told = float(late_stable_rank(tokens=tokens, ratio=ratio, deviation=deviation)) - 1
    error = with_mean.std() / math.sqrt(draws)
    assert abs(with_mean.mean() - 1 - told) < 3 * error + 0.15 * told
    told = float(late_stable_rank_centred(tokens=tokens, ratio=ratio))
    if s < 0.5:  # a soft edge comes from below, like T^(-2/3)
        assert without.mean() == pytest.approx(told, rel=0.11 * (384 / tokens) ** (2 / 3))
    else:  # and that of entries with heavy tails from above
        assert 0.6 * told < without.mean() < 1.1 * told


def test_the_rank_of_late_queries_stays_a_little_above_one():
    far = float(late_stable_rank(tokens=1e9))
    assert far == pytest.approx(1.0053, abs=2e-4)
    squares = late_averaging(np.arange(1, 400)) ** 4
    assert far == pytest.approx(squares.sum() / squares[0], rel=1e-6)


@pytest.mark.parametrize("tokens", [128, 384])
@pytest.mark.parametrize("s", [0.0, 0.5])
def test_the_contrast_that_late_queries_pass_on_falls_with_the_width_law(tokens, s):
    generator = np.random.default_rng(0)
    late = slice(tokens // 2, None)
    V = generator.normal(size=(tokens, 1500))
    O = (causal(tokens, s, generator) @ V)[late]  # noqa: E741
    gain = np.sqrt(np.square(O - O.mean(0)).sum(1).mean() / np.square(V - V.mean(0)).sum(1).mean())
    assert gain == pytest.approx(float(causal_contrast_gain(math.sqrt(math.expm1(s * s)), tokens=tokens)), rel=0.04)


def test_arrays_give_what_single_numbers_give():
    tokens, ratios = np.array([64, 256]), np.array([0.5, 1.0, 2.0])[:, None]
    for f in (late_stable_rank, late_stable_rank_centred):
        together = f(tokens=tokens, ratio=ratios)
        assert together.shape == (3, 2)
        for i, j in np.ndindex(3, 2):
            assert together[i, j] == pytest.approx(float(f(tokens=tokens[j], ratio=ratios[i, 0])), rel=1e-12)
    assert late_edge(np.array([0.5, 1.0]), tokens=100).tolist() == [
        float(late_edge(one, tokens=100)) for one in (0.5, 1)
    ]
    np.testing.assert_array_equal(cesaro_outlier(tokens), [float(cesaro_outlier(one)) for one in tokens])
