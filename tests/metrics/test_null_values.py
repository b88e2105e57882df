"""A null is what simulation of Gaussian tokens, or shuffling of rows, gives: closed forms included."""

import math

import pytest
import torch

import fullrank.metrics as metrics
from fullrank.errors import TableError
from fullrank.metrics import VOCABULARY, nulls
from oracles.worlds import world

ATTENTION = {name for name in VOCABULARY if VOCABULARY[name].level == "attention"}
STATES = sorted(
    name
    for name, metric in VOCABULARY.items()
    if metric.level in ("token", "batch", "sample") and metric.unit != "position"  # a place has no null
)


@pytest.mark.parametrize("name", STATES)
def test_every_metric_of_states_has_a_null(name):
    mean, stderr = metrics.null_value(name, tokens=12, width=16, sequences=3)
    low, high = VOCABULARY[name].range
    assert low <= mean <= high
    assert stderr >= 0


def simulate(name, *, T, d, S, draws):
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(draws):
        X, Y = (torch.randn(S, T, d, generator=generator, dtype=torch.float64) for _ in range(2))
        metric = getattr(metrics, name)
        two = name in ("neighbour_cosine", "identity_distance", "span_novelty", "neighbourhood_overlap")
        found.append((metric(X, Y) if two else metric(X)).mean())
    found = torch.stack(found)
    return float(found.mean()), float(found.std()) / math.sqrt(draws)


@pytest.mark.parametrize("name", sorted(nulls._CLOSED))
def test_a_closed_form_equals_what_simulation_gives(name):
    mean, spread = simulate(name, T=6, d=9, S=3, draws=400)
    closed, stderr = metrics.null_value(name, tokens=6, width=9, sequences=3)
    assert stderr == 0
    assert abs(mean - closed) <= 4 * spread + 1e-12


@pytest.mark.parametrize("name", ["stable_rank", "centered_gram_stable_rank", "orthogonality_gap", "update_share"])
def test_a_simulated_null_carries_an_honest_standard_error(name):
    few, error = metrics.null_value(name, tokens=20, width=12, draws=8)
    many, _ = metrics.null_value(name, tokens=20, width=12, draws=200, seed=9)
    assert error > 0
    assert abs(few - many) < 6 * error


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("stable_rank", lambda T, d: T * d / (math.sqrt(T) + math.sqrt(d)) ** 2),
        ("gram_stable_rank", lambda T, d: T * d * (T + d) / (math.sqrt(T) + math.sqrt(d)) ** 4),
        ("participation_ratio", lambda T, d: T * d / (T + d + 1)),
        ("channel_entropy", lambda T, d: 1 - 1 / (T * math.log(d))),
        ("orthogonality_gap", lambda T, d: math.sqrt((T + 1) / (T * d))),
        ("isometry_gap", lambda T, d: (T + 1) / (2 * d)),
    ],
)
def test_the_formulas_that_the_vocabulary_quotes_hold_for_large_sizes(name, formula):
    T, d, draws = (20, 1000, 40) if name == "isometry_gap" else (900, 600, 2)  # the edge converges as N^(−2/3) only
    mean, _ = metrics.null_value(name, tokens=T, width=d, sequences=1, draws=draws)
    assert mean == pytest.approx(formula(T, d), rel=0.04)


def test_the_spread_of_similarity_is_what_the_vocabulary_quotes():
    T, d = 12, 40
    X = torch.randn(2000, T, d, generator=torch.Generator().manual_seed(1))
    assert float(metrics.similarity(X).std()) == pytest.approx(math.sqrt(2 / d) / T, rel=0.1)


def test_nulls_are_the_same_for_the_same_seed_and_are_remembered():
    first = metrics.null_value("effective_rank", tokens=9, width=5, seed=4)
    assert metrics.null_value("effective_rank", tokens=9, width=5, seed=4) is first
    assert metrics.null_value("effective_rank", tokens=9, width=5, seed=5) != first


def test_a_metric_without_a_null_of_tokens_is_answered_in_one_sentence():
    with pytest.raises(TableError, match="metric='entropy' has no null of Gaussian tokens"):
        metrics.null_value("entropy", tokens=4, width=4)


def test_shuffling_leaves_numbers_of_single_rows_as_they_are():
    w = world(0)
    for name in ("entropy", "normalized_entropy", "effective_keys", "inverse_participation"):
        mean, stderr = metrics.permuted_null(name, w.A, w.visible)
        torch.testing.assert_close(mean, getattr(metrics, name)(w.A, w.visible))
        assert bool((stderr < 1e-12).all())


def test_bulk_excess_is_s2_over_its_permuted_null():
    w = world(0)
    mean, _ = metrics.permuted_null("attention_s2", w.A, w.visible, draws=4, seed=0)
    torch.testing.assert_close(metrics.bulk_excess(w.A, w.visible), metrics.attention_s2(w.A, w.visible) / mean)


def test_independent_rows_of_soft_logits_have_the_s2_that_the_vocabulary_quotes(generator):
    """2 √(Y₂ − 1/T) for logits of standard deviation up to .7; 30 % low at 1."""
    T = 400
    for std, low, high in ((0.3, 0.95, 1.05), (0.7, 0.95, 1.15), (1.0, 1.05, 1.5)):
        A = (std * torch.randn(T, T, generator=generator)).softmax(-1)
        predicted = 2 * torch.sqrt(metrics.inverse_participation(A) - 1 / T)
        assert low < float(metrics.attention_s2(A) / predicted) < high


def test_a_head_that_reads_by_content_stands_out_of_its_permuted_null(generator):
    cluster = torch.arange(40) // 10
    A = torch.where(cluster[:, None] == cluster, 0.1, 0.0)
    mean, stderr = metrics.permuted_null("attention_s2", A, draws=6)
    assert metrics.attention_s2(A) > mean + 10 * stderr
    mean, stderr = metrics.permuted_null("selectivity", A, draws=6)
    assert metrics.selectivity(A) > 0.8 * mean


def test_one_draw_has_no_standard_error():
    w = world(0)
    _, stderr = metrics.permuted_null("attention_s1", w.A, w.visible, draws=1)
    assert bool(stderr.isnan().all())


def test_metrics_of_values_need_them_and_unknown_names_are_refused():
    w = world(0)
    for name in ("branch_energy", "contrast_gain"):
        mean, _ = metrics.permuted_null(name, w.A, w.visible, V=w.V)
        assert mean.shape == (3,)
    for name in ("branch_energy", "contrast_gain", "logit_std", "nonsense"):
        with pytest.raises(TableError, match="has no permuted null"):
            metrics.permuted_null(name, w.A, w.visible)
