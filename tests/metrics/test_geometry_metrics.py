"""Neighbours equal those found with loops; dimensions are what the likelihood asks for."""

import math

import pytest
import torch

import fullrank.metrics as metrics
from fullrank.errors import BatchError
from fullrank.metrics import geometry
from oracles import states


def batch(generator, shape=(2, 14, 5)):
    X = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape[:-1], generator=generator) > 0.2
    mask[..., :8] = True
    return X, mask


def real(X, mask):
    return [x[m] for x, m in zip(X, mask, strict=True)]


@pytest.mark.parametrize("block", [1, 37, 1 << 22])
def test_nearest_neighbours_equal_those_of_a_sort(block, generator, monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK", block)
    X, _ = batch(generator)
    found = metrics.nearest_neighbours(X, None, 3)
    for b in range(len(X)):
        assert found.indices[b].tolist() == states.neighbours(X[b], 3)
        for t, s in ((0, 0), (5, 2)):
            apart = X[b, t] - X[b, found.indices[b, t, s]]
            assert float(found.distances[b, t, s]) == pytest.approx(float(apart.norm()))


def test_neighbours_are_real_and_missing_ones_are_marked(generator):
    X, mask = batch(generator)
    mask[0] = torch.arange(14) < 3
    found = metrics.nearest_neighbours(X, mask, 20)
    assert found.indices.shape == (2, 14, 20)
    assert set(found.indices[0, 0].tolist()) == {1, 2, -1}
    assert bool(found.distances[0, 0, 2:].isinf().all())


def test_some_queries_see_all_tokens(generator):
    X, _ = batch(generator)
    rows = torch.tensor([3, 11])
    everything = metrics.nearest_neighbours(X, None, 4)
    assert torch.equal(metrics.nearest_neighbours(X, None, 4, rows).indices, everything.indices[:, rows])


def test_tokens_that_differ_in_the_seventh_digit_of_a_large_mean_keep_their_neighbours(generator):
    X = 1000 + 1e-3 * torch.randn(12, 6, generator=generator)
    assert metrics.nearest_neighbours(X, None, 3).indices.tolist() == states.neighbours(X.double(), 3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_neighbourhood_overlap_equals_its_definition(k, generator):
    X, mask = batch(generator)
    Y, _ = batch(generator)
    expected = [
        states.neighbourhood_overlap(x, y, k) for x, y in zip(real(X, mask), real(X + 0.7 * Y, mask), strict=True)
    ]
    found = metrics.neighbourhood_overlap(X, X + 0.7 * Y, mask, k=k)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_drawn_points_estimate_the_overlap_and_say_the_same_when_all_are_drawn(generator):
    X = torch.randn(300, 6, generator=generator)
    Y = X + 0.3 * torch.randn(300, 6, generator=generator)
    everything = metrics.neighbourhood_overlap(X, Y)
    assert metrics.neighbourhood_overlap(X, Y, points=300) == everything
    assert metrics.neighbourhood_overlap(X, Y, points=100) == pytest.approx(float(everything), abs=0.1)


def test_scale_two_is_two_nn_on_the_different_tokens(generator):
    X, mask = batch(generator)
    expected = [states.two_nn(x) for x in real(X, mask)]
    repeated = torch.cat([X, X[:, :4]], 1)
    repeated_mask = torch.cat([mask, mask[:, :4]], 1)
    torch.testing.assert_close(
        metrics.intrinsic_dimension(repeated, repeated_mask), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("scale", [4, 8])
def test_larger_scales_maximise_the_likelihood_of_gride(scale, generator):
    X = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    d = float(metrics.intrinsic_dimension(X, scale=scale))
    best = states.gride_log_likelihood(X, scale, d)
    for factor in (0.98, 0.999, 1.001, 1.02):
        assert states.gride_log_likelihood(X, scale, d * factor) < best


def test_too_few_different_tokens_have_no_dimension():
    X = torch.eye(5)
    assert metrics.intrinsic_dimension(X[:2]).isnan()
    assert metrics.intrinsic_dimension(X[[0, 1, 1, 0]]).isnan()
    assert metrics.neighbourhood_overlap(X[:2], X[:2]).isnan()


@pytest.mark.parametrize("scale", [0, 1, 3, 6])
def test_a_scale_that_is_no_power_of_two_is_refused(scale):
    with pytest.raises(BatchError, match=f"scale={scale} is not a power of two"):
        metrics.intrinsic_dimension(torch.eye(4), scale=scale)


def test_a_line_has_dimension_one(generator):
    X = torch.rand(400, 1, generator=generator) * torch.ones(3)
    assert metrics.intrinsic_dimension(X) == pytest.approx(1, abs=0.15)
    assert metrics.intrinsic_dimension(X, scale=16) == pytest.approx(1, abs=0.1)
    assert math.isfinite(metrics.intrinsic_dimension(X, points=50))


def test_neighbours_at_hand_change_no_number(generator):
    X = torch.randn(3, 40, 8, generator=generator)
    Y = X + 0.5 * torch.randn(3, 40, 8, generator=generator)
    X[2, 5] = X[2, 9]  # exact duplicates leave the cloud, and their neighbours are then others
    mask = torch.arange(40) < torch.tensor([[40], [25], [31]])
    near, before = metrics.nearest_neighbours(X, mask, 2), metrics.nearest_neighbours(Y, mask, 2)
    expected = metrics.intrinsic_dimension(X, mask)
    torch.testing.assert_close(metrics.intrinsic_dimension(X, mask, neighbours=near), expected, rtol=1e-9, atol=0)
    wrong = metrics.intrinsic_dimension(X, mask, neighbours=before)
    assert (wrong[:2] != expected[:2]).all()  # they are read where nothing stands twice
    assert wrong[2] == expected[2]
    found = metrics.neighbourhood_overlap(X, Y, mask, neighbours=(near, before))
    assert torch.equal(found, metrics.neighbourhood_overlap(X, Y, mask))
    assert not torch.equal(found, metrics.neighbourhood_overlap(X, Y, mask, neighbours=(near, near)))
