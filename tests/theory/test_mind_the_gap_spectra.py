"""Spectra of random Markov matrices, differential attention and key–query maps, against factorised matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fullrank.theory import quarter_circle
from fullrank.theory.key_query_bulk import (
    key_query_cdf,
    key_query_density,
    key_query_edge,
    key_query_stable_rank,
)
from fullrank.theory.mind_the_gap_spectra import (
    deviation_of_logits,
    deviation_of_moments,
    differential_edge,
    differential_eigenvalue,
    differential_outlier,
    differential_strength,
    eigenvalue_edge,
    energy,
    outlier,
    outlier_share,
    singular_edge,
)
from golden import assert_golden


def markov(tokens, s, seed=0, draws=1):
    """Softmax of independent Gaussian logits."""
    A = np.exp(np.random.default_rng(seed).normal(0.0, s, (draws, tokens, tokens)))
    return A / A.sum(-1, keepdims=True)


def key_query(tokens, channels, s, generator):
    Q, K = generator.normal(size=(2, tokens, channels))
    A = np.exp(s * Q @ K.T / math.sqrt(channels))
    return A / A.sum(-1, keepdims=True)


def energies(s, tokens):
    """Of the logits' own part, and of what the exponential adds."""
    return s * s / tokens, (math.expm1(s * s) - s * s) / tokens


# ------------------------------------------------------------ golden numbers


@pytest.mark.parametrize("entries", ["lognormal", "exponential"])
def test_outlier_and_edges_meet_their_golden_numbers(entries):
    deviation = float(
        deviation_of_logits(math.sqrt(math.log(2))) if entries == "lognormal" else deviation_of_moments(1.0, 1.0)
    )
    assert deviation == pytest.approx(1.0)
    T = 1000
    root = math.sqrt(T)
    s1 = float(outlier(deviation, tokens=T))
    edges = [float(f(deviation, tokens=T)) * root for f in (singular_edge, eigenvalue_edge, singular_edge)]
    numbers = [*edges, float(energy(deviation))]
    if entries == "lognormal":
        assert_golden("mtg-iid-lognormal-s1", s1)
        assert_golden("mtg-iid-lognormal-edge", numbers)
    else:
        assert_golden("mtg-iid-exponential-edge", [s1, *numbers])


def test_key_query_maps_have_the_heavier_edge_of_their_golden_number():
    T = 150
    deviation = deviation_of_logits(1.0)
    edge = float(key_query_edge(*energies(1.0, T), ratio=1.0)) * math.sqrt(T)
    assert_golden(
        "mtg-kq-normal-spectrum",
        [float(outlier(deviation, tokens=T)), edge, float(energy(deviation, centred=True))],
    )
    assert edge > 1.1 * float(singular_edge(deviation, tokens=1))  # what independent logits would give


def test_differential_attention_meets_its_golden_numbers():
    assert_golden("of-diff-s1", differential_outlier(np.array([0.0, 0.5, 1.0]), 1.0, tokens=600))
    assert_golden("of-diff-lambda-init", differential_strength(np.arange(4)))


# ------------------------------------------------------------ against matrices, at two sizes


@pytest.mark.parametrize("tokens", [120, 360])
@pytest.mark.parametrize("s", [0.4, 0.9])
def test_outlier_share_energy_and_edges_are_those_of_random_matrices(tokens, s):
    draws = 24 if tokens < 200 else 6
    A = markov(tokens, s, draws=draws)
    deviation = deviation_of_logits(s, tokens=tokens)
    values = np.linalg.svd(A, compute_uv=False)
    found = np.square(A).sum((1, 2)).mean()
    assert found == pytest.approx(float(energy(deviation)), rel=0.02)
    beyond, error = values[:, 0].mean() - 1, values[:, 0].std() / math.sqrt(draws)
    expected = float(outlier(deviation, tokens=tokens)) - 1
    assert abs(beyond - expected) < 4 * error + 0.02 * expected
    share = np.square(values[:, 0]) / np.square(values).sum(1)
    assert share.mean() == pytest.approx(float(outlier_share(deviation, tokens=tokens)), rel=0.02)
    # logits of spread .9 have heavy-tailed entries: the edge converges slowly there
    assert values[:, 1].mean() == pytest.approx(
        float(singular_edge(deviation, tokens=tokens)), rel=0.05 if s < 0.5 else 0.2
    )
    radius = np.sort(np.abs(np.linalg.eigvals(A[:4])))[:, -2].mean()
    assert radius == pytest.approx(float(eigenvalue_edge(deviation, tokens=tokens)), rel=0.12 if s < 0.5 else 0.2)


def test_without_the_outlier_the_gap_is_closed():
    T, s = 200, 0.5
    B = markov(T, s)[0] - 1 / T
    deviation = deviation_of_logits(s)
    assert np.linalg.norm(B, 2) == pytest.approx(float(singular_edge(deviation, tokens=T)), rel=0.05)
    assert np.abs(np.linalg.eigvals(B)).max() == pytest.approx(float(eigenvalue_edge(deviation, tokens=T)), rel=0.1)
    assert np.square(B).sum() == pytest.approx(float(energy(deviation, centred=True)), rel=0.03)


@pytest.mark.parametrize("tokens", [100, 300])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_differential_attention_has_the_eigenvalue_outlier_and_edge_of_the_formulas(tokens, strength):
    first, second = markov(tokens, 0.6, seed=3, draws=2)
    D = first - strength * second
    np.testing.assert_allclose(D @ np.ones(tokens), float(differential_eigenvalue(strength)), atol=1e-12)
    values = np.linalg.svd(D, compute_uv=False)
    deviation = deviation_of_logits(0.6, tokens=tokens)
    assert values[0] == pytest.approx(float(differential_outlier(strength, deviation, tokens=tokens)), rel=0.08)
    assert values[1] == pytest.approx(float(differential_edge(strength, deviation, tokens=tokens)), rel=0.08)


def test_the_deviation_at_finite_size_stays_below_what_one_key_could_give():
    assert float(deviation_of_logits(0.3)) == pytest.approx(float(deviation_of_logits(0.3, tokens=4096)), rel=0.01)
    assert float(deviation_of_logits(8.0, tokens=64)) < math.sqrt(63)
    assert np.isinf(deviation_of_logits(40.0))


# ------------------------------------------------------------ the quarter circle


def test_the_quarter_circle_is_a_law():
    s = np.linspace(0, 1.2, 200001)
    p = quarter_circle.density(s, edge=1.2)
    assert np.trapezoid(p, s) == pytest.approx(1.0, abs=1e-6)
    assert np.trapezoid(p * s**2, s) == pytest.approx(1.2**2 / 4, abs=1e-6)
    some = s[::20000]
    integral = [np.trapezoid(p[: 20000 * k + 1], s[: 20000 * k + 1]) for k in range(len(some))]
    np.testing.assert_allclose(quarter_circle.cdf(some, edge=1.2), integral, atol=1e-6)
    shares = np.linspace(0, 1, 33)
    np.testing.assert_allclose(
        quarter_circle.cdf(quarter_circle.quantile(shares, edge=1.2), edge=1.2), shares, atol=1e-14
    )
    assert quarter_circle.density(1.3, edge=1.2) == 0
    assert quarter_circle.cdf(np.array([-1.0, 5.0])).tolist() == [0.0, 1.0]


def test_quantiles_lie_over_the_bulk_of_a_random_markov_matrix():
    T, s = 300, 0.5
    bulk = np.linalg.svd(markov(T, s)[0], compute_uv=False)[:0:-1]
    edge = float(singular_edge(deviation_of_logits(s, tokens=T), tokens=T))
    overlay = quarter_circle.quantile((np.arange(T - 1) + 0.5) / (T - 1), edge=edge)
    assert np.abs(bulk - overlay).max() < 0.05 * edge


# ------------------------------------------------------------ keys and queries of few channels


@pytest.mark.parametrize(("tokens", "channels"), [(160, 20), (160, 160), (320, 32)])
@pytest.mark.parametrize("s", [0.15, 0.5])
def test_the_edge_of_key_query_maps_depends_on_the_channels(tokens, channels, s):
    generator = np.random.default_rng(1)
    found = [np.linalg.svd(key_query(tokens, channels, s, generator), compute_uv=False)[1] for _ in range(3)]
    expected = float(key_query_edge(*energies(s, tokens), ratio=channels / tokens))
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
    if channels < tokens / 4:
        assert expected > 1.4 * float(singular_edge(deviation_of_logits(s), tokens=tokens))


def test_tokens_of_few_channels_widen_the_edge_again():
    generator = np.random.default_rng(2)
    T, d, channels, s = 320, 160, 64, 0.3
    found = []
    for _ in range(4):
        X = generator.normal(size=(T, d))
        W_Q, W_K = generator.normal(size=(2, d, channels)) / math.sqrt(d)
        A = np.exp(s * (X @ W_Q) @ (X @ W_K).T / math.sqrt(channels))
        found.append(np.linalg.svd(A / A.sum(-1, keepdims=True), compute_uv=False)[1])
    narrow = float(key_query_edge(*energies(s, T), ratio=channels / T, narrowing=channels / d))
    assert np.mean(found) == pytest.approx(narrow, rel=0.1)
    assert narrow > 1.1 * float(key_query_edge(*energies(s, T), ratio=channels / T))


def test_many_channels_and_context_have_the_limits_that_are_claimed():
    linear, rest = energies(0.7, 256)
    many = float(key_query_edge(linear, rest, ratio=1e6))
    assert many == pytest.approx(2 * math.sqrt(linear + rest), rel=1e-3)
    # for T far above the channels it stays at s/√d_h, instead of falling like 1/√T
    long = float(key_query_edge(*energies(0.1, 10**7), ratio=64 / 10**7))
    assert long == pytest.approx(0.1 / 8, rel=0.01)
    assert float(key_query_edge(0.0, 0.0, ratio=1.0)) == pytest.approx(0.0, abs=1e-100)
    assert float(key_query_edge(0.0, 0.25, ratio=0.1)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_the_law_of_key_query_maps_is_a_law_with_their_second_moment_and_edge(ratio):
    linear, rest = 0.6, 0.4
    edge = float(key_query_edge(linear, rest, ratio=ratio))
    s = edge * np.square(np.sin(np.linspace(1e-4, 1, 3000) * np.pi / 2))
    p = key_query_density(s, linear, rest, ratio=ratio)
    assert np.trapezoid(p, s) == pytest.approx(1.0, abs=0.01)
    assert np.trapezoid(p * s**2, s) == pytest.approx(linear + rest, rel=0.01)
    assert key_query_density(np.array([1.01 * edge]), linear, rest, ratio=ratio)[0] == pytest.approx(0, abs=1e-6)
    shares = key_query_cdf(s, linear, rest, ratio=ratio)
    assert np.all(np.diff(shares) >= -1e-12)
    assert shares[-1] == pytest.approx(1.0)
    fourth = linear**2 / ratio + 2 * (linear + rest) ** 2  # used by the stable rank
    assert np.trapezoid(p * s**4, s) == pytest.approx(fourth, rel=0.01)


def test_without_the_running_outlier_key_query_layers_keep_less_rank_than_independent_rows():
    """`mtg-kq-sr-fix`: its T = 350 stands at 14.9, sixteen draws there give 17.1 ± .5, and the formula 18.8."""
    sizes = np.array([50, 150, 350])
    told = np.array([float(key_query_stable_rank(*energies(1.0, T), tokens=T, ratio=1.0)) for T in sizes])
    np.testing.assert_allclose(told[:2], [2.9, 7.1], rtol=0.25)
    assert told[2] == pytest.approx(17.1, rel=0.15)
    assert np.all(told < 0.066 * sizes)
    generator, found = np.random.default_rng(4), []
    for _ in range(6):
        T = 150
        B = key_query(T, T, 1.0, generator) - 1 / T
        values = np.linalg.svd(B @ generator.normal(size=(T, T)), compute_uv=False)
        found.append((values**4).sum() / values[0] ** 4)
    assert np.mean(found) == pytest.approx(told[1], rel=0.25)


def test_arrays_give_what_single_numbers_give():
    deviations, tokens = np.array([0.3, 0.9])[:, None], np.array([64, 256, 1024])
    for f in (outlier, singular_edge, eigenvalue_edge, outlier_share):
        together = f(deviations, tokens=tokens)
        assert together.shape == (2, 3)
        for i, j in np.ndindex(2, 3):
            assert together[i, j] == float(f(deviations[i, 0], tokens=tokens[j]))
    together = key_query_edge(deviations, 0.1, ratio=np.array([0.1, 1.0, 3.0]))
    alone = [[float(key_query_edge(d, 0.1, ratio=y)) for y in (0.1, 1.0, 3.0)] for d in (0.3, 0.9)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    strengths = np.array([0.1, 0.5, 1.0])
    alone = [float(differential_outlier(one, 1.0, tokens=200)) for one in strengths]
    np.testing.assert_allclose(differential_outlier(strengths, 1.0, tokens=200), alone)
