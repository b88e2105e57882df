"""The distance of a map's bulk from the law: small for random Markov matrices, large where rows know of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fullrank.errors import TheoryError
from fullrank.theory import quarter_circle
from fullrank.theory.bulk_distance import (
    bulk_distance,
    bulk_values,
    late_law,
    null_distances,
    random_maps,
    row_excess,
)
from fullrank.theory.key_query_bulk import key_query_cdf


def key_query(tokens, channels, s, seed=0):
    Q, K = np.random.default_rng(seed).normal(size=(2, tokens, channels))
    A = np.exp(s * Q @ K.T / math.sqrt(channels))
    return A / A.sum(-1, keepdims=True)


def test_distances_are_those_of_their_definitions():
    values, edge = np.array([0.1, 0.5, 0.9]), 1.0
    found = bulk_distance(values, edge**2 / 4)
    places = np.linspace(0, 2, 400001)
    own = np.searchsorted(values, places, side="right") / 3
    law = quarter_circle.cdf(places)
    assert float(found.kolmogorov) == pytest.approx(np.abs(own - law).max(), abs=1e-5)
    assert float(found.wasserstein) == pytest.approx(np.trapezoid(np.abs(own - law), places), abs=1e-3)
    assert float(found.largest) == pytest.approx(0.9)
    # σ from the values' own second moment, unless another is given
    assert float(bulk_distance(values).edge) == pytest.approx(2 * math.sqrt(np.mean(values**2)))


def test_the_laws_own_quantiles_are_as_near_as_they_can_be():
    n = 200
    found = bulk_distance(quarter_circle.quantile((np.arange(n) + 0.5) / n, edge=0.3), 0.3**2 / 4)
    assert float(found.kolmogorov) == pytest.approx(0.5 / n, rel=1e-6)
    assert float(found.wasserstein) < 0.5 / n


@pytest.mark.parametrize("causal", [False, True])
def test_random_markov_matrices_are_near_and_nearer_as_they_grow(causal):
    small, large = (null_distances(T, 0.4, causal=causal, draws=8) for T in (24, 96))
    assert large.kolmogorov.mean() < 0.5 * small.kolmogorov.mean()
    assert large.wasserstein.mean() < 0.5 * small.wasserstein.mean()
    assert large.kolmogorov.max() < 0.1


def test_the_second_moment_is_that_of_the_entries():
    T, s = 200, 0.5
    maps = random_maps(T, s, draws=3, seed=0, causal=False)
    assert row_excess(maps).mean() == pytest.approx(math.expm1(s * s) / T, rel=0.05)
    assert np.square(bulk_values(maps)).mean() == pytest.approx(row_excess(maps).mean(), rel=0.02)
    maps = random_maps(T, s, draws=3, seed=0, causal=True)
    told = 2 * math.log(2) * math.expm1(s * s) / T
    assert row_excess(maps, causal=True).mean() == pytest.approx(told, rel=0.05)
    assert np.square(bulk_values(maps, causal=True)).mean() == pytest.approx(row_excess(maps, causal=True).mean())


def test_key_query_maps_of_few_channels_are_beyond_the_null_and_near_their_own_law():
    """What ends the model's reach at initialisation: heads narrower than the context is long."""
    T, s = 128, 0.3
    null = null_distances(T, s, draws=10)
    narrow = bulk_values(np.stack([key_query(T, 16, s, seed) for seed in range(3)]))
    wide = bulk_values(np.stack([key_query(T, 20000, s, seed) for seed in range(3)]))
    assert bulk_distance(wide).kolmogorov.max() < 1.5 * null.kolmogorov.max()
    far = bulk_distance(narrow)
    assert far.kolmogorov.min() > 10 * null.kolmogorov.max()
    assert far.largest.min() > 1.5
    share = s * s / math.expm1(s * s)

    def own(place, edge):
        return key_query_cdf(place / edge, share / 4, (1 - share) / 4, ratio=16 / T)

    near = bulk_distance(narrow, law=own)
    assert near.wasserstein.max() < far.wasserstein.min() / 3


def test_causal_maps_have_a_law_of_their_own():
    T, s = 96, 0.4
    law = late_law(T, s)
    assert law(np.array([0.0, 0.5, 5.0]), np.array(1.0))[[0, 2]].tolist() == [0.0, 1.0]
    values = bulk_values(random_maps(T, s, draws=4, seed=9, causal=True), causal=True)
    assert bulk_distance(values, law=law).kolmogorov.max() < bulk_distance(values).kolmogorov.min()


def test_maps_that_are_none_or_have_no_bulk_are_answered_in_a_sentence():
    with pytest.raises(TheoryError, match="square maps"):
        bulk_values(np.ones((3, 4)))
    with pytest.raises(TheoryError, match="square maps"):
        bulk_values(np.full((4, 4), np.nan))
    with pytest.raises(TheoryError, match="uniform"):
        bulk_distance(np.zeros(5))
