"""Equilibria of attention with a norm: made, found stable or not by really perturbing them, and their basins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.golden import assert_golden

from fullrank.errors import TheoryError
from fullrank.theory.wu_masks_layernorm_basins import basin, limits, rank_shares
from fullrank.theory.wu_masks_layernorm_equilibria import (
    bidiagonal_values,
    is_stable,
    local_multipliers,
    normalised_layer,
    token_multipliers,
    two_token_equilibria,
    two_token_values,
    values_for,
)

FIRST_SEES_ITSELF = np.array([[1.0, 0.0], [0.5, 0.5]])
TWO = ((0.0, 1.0), (-0.6, -0.8), (-1.0, 0.0))  # of the second token, beside a first at (0, 1)


def causal(count):
    weights = np.tril(np.ones((count, count)))
    return weights / weights.sum(1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_layer_by_loops(x, attention, values):
    made = []
    for i in range(len(x)):
        y = sum(attention[i, j] * x[j] for j in range(len(x))) @ values
        made.append(y / math.sqrt(sum(entry * entry for entry in y)))
    return np.array(made)


# ------------------------------------------------------------ two tokens


def test_the_two_token_example_meets_its_golden_numbers():
    values = two_token_values(0.5, 1.0)
    stable = two_token_equilibria(0.5, 1.0)[0]
    assert_golden("wu-two-token-equilibrium", stable)
    x = np.array([[0.0, 1.0], [-1.0, -0.1]])
    for _ in range(200):
        x = one_layer_by_loops(x, FIRST_SEES_ITSELF, values)
    assert_golden("wu-two-token-equilibrium", x[1])
    tokens = [np.array([[0.0, 1.0], second]) for second in TWO]
    assert_golden("wu-two-token-multipliers", [token_multipliers(x, FIRST_SEES_ITSELF, values)[1] for x in tokens])
    assert [is_stable(x, FIRST_SEES_ITSELF, values) for x in tokens] == [True, True, False]


def test_the_two_token_example_ends_in_four_places_only_and_two_of_them_have_rank_two():
    values = two_token_values(0.5, 1.0)
    ends = limits(np.random.default_rng(0).standard_normal((400, 2, 2)), FIRST_SEES_ITSELF, values)
    four = [s * np.array([[0.0, 1.0], second]) for s in (1, -1) for second in TWO[:2]]
    assert all(min(np.abs(end - one).max() for one in four) < 1e-9 for end in ends)
    shares = rank_shares(2, FIRST_SEES_ITSELF, values, samples=400, seed=0)
    assert shares[1].value == pytest.approx(np.mean([abs(np.linalg.det(end)) > 1e-3 for end in ends]))
    assert 0.02 < shares[1].value < 0.2


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.9), (0.5, -1.2), (0.7, 3.0)])
def test_the_family_of_two_tokens_has_the_equilibria_of_its_formula(a, b):
    pair = two_token_equilibria(a, b)
    stable = []
    for second in pair:
        x = np.array([[0.0, 1.0], second])
        assert np.linalg.norm(second) == pytest.approx(1.0)
        assert normalised_layer(x, FIRST_SEES_ITSELF, two_token_values(a, b)) == pytest.approx(x, abs=1e-12)
        stable.append(is_stable(x, FIRST_SEES_ITSELF, two_token_values(a, b)))
    assert stable == [True, False]


def test_there_is_none_of_rank_two_below_the_family_s_threshold():
    a = np.array([0.2, 0.5, 0.8])
    edge = np.sqrt(a * (2 - a))
    assert np.isnan(two_token_equilibria(a, 0.999 * edge)).all()
    assert np.isfinite(two_token_equilibria(a, 1.001 * edge)).all()
    assert two_token_equilibria(a, 1.001 * edge).shape == (3, 2, 2)
    for one, shear in zip(a, 0.95 * edge, strict=True):
        # just below the threshold tokens linger where the pair would be: the second angle moves on slowly
        shares = rank_shares(2, FIRST_SEES_ITSELF, two_token_values(one, shear), samples=200, seed=1, layers=2000)
        assert shares[1].value == 0


# ------------------------------------------------------------ any tokens


@pytest.mark.parametrize(("count", "width"), [(4, 4), (3, 7)])
def test_any_independent_tokens_are_an_equilibrium_of_some_values(count, width):
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((count, width)))
    attention = rng.random((count, count)) + np.eye(count)
    attention /= attention.sum(1, keepdims=True)
    scales = rng.uniform(0.5, 2.0, count)
    values = values_for(x, attention, scales)
    away = np.abs(normalised_layer(x, attention, values) - x).max()
    if (count, width) == (4, 4):
        assert_golden("wu-any-x-equilibrium", away)
    assert away < 1e-12
    assert one_layer_by_loops(x, attention, values) == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("count", [3, 5])
def test_the_values_of_a_causal_equilibrium_have_known_eigenvalues_and_rank_one_stands_beside_it(count):
    rng = np.random.default_rng(count)
    x, scales = unit(rng.standard_normal((count, count))), rng.uniform(0.5, 2.0, count)
    values = values_for(x, causal(count), scales)
    expected = scales * np.arange(1, count + 1)
    assert np.sort(np.linalg.eigvals(values).real) == pytest.approx(np.sort(expected), rel=1e-6)
    eigenvalues, vectors = np.linalg.eig(values.T)
    for eigenvector in vectors.T[np.abs(eigenvalues.imag) < 1e-12].real:
        alike = np.tile(eigenvector, (count, 1))
        assert normalised_layer(alike, causal(count), values) == pytest.approx(alike, abs=1e-9)


def rank_three():
    x = np.array([(-0.4393, 0.0839, 0.8944), (-0.5221, 0.4493, -0.7250), (0.5215, -0.5463, 0.6554)])
    eigenvalues = np.array([1.0, 0.7951, 0.6326])  # of W_V: Λ_i / A_ii
    return x, causal(3), values_for(x, causal(3), eigenvalues / np.arange(1, 4))


def test_the_stable_equilibrium_of_rank_three_meets_its_golden_number_and_few_starts_find_it():
    x, attention, values = rank_three()
    assert_golden("wu-rank3-equilibrium", float(local_multipliers(x, attention, values)[0]))
    assert is_stable(x, attention, values)
    near = [basin(x, attention, values, perturbation=p, samples=600, seed=0) for p in (1e-4, 1e-3, 1e-2)]
    assert near[0].value > 0.9
    assert abs(near[1].value - 0.33) < 4 * near[1].stderr  # shares that the card gives
    assert abs(near[2].value - 0.017) < 4 * near[2].stderr
    assert basin(x, attention, values, samples=2000, seed=0, layers=300).value == 0


@pytest.mark.parametrize(("count", "width"), [(3, 3), (4, 6)])
def test_multipliers_are_those_of_the_layer_s_derivative(count, width):
    """By differences of really perturbed layers, for attention that is not causal."""
    rng = np.random.default_rng(width)
    x = unit(rng.standard_normal((count, width)))
    attention = rng.random((count, count)) + np.eye(count)
    attention /= attention.sum(1, keepdims=True)
    values = values_for(x, attention, rng.uniform(0.5, 2.0, count))
    step, jacobian = 1e-6, np.zeros((count * width, count * width))
    for k in range(count * width):
        moved = np.zeros(count * width)
        moved[k] = step
        moved = moved.reshape(count, width)
        moved -= (moved * x).sum(1, keepdims=True) * x  # rows keep norm 1
        up, down = (one_layer_by_loops(x + s * moved, attention, values) for s in (1, -1))
        jacobian[:, k] = ((up - down) / (2 * step)).ravel()
    seen = np.sort(np.abs(np.linalg.eigvals(jacobian)))[::-1]
    found = local_multipliers(x, attention, values)
    assert found.shape == (count * (width - 1),)
    assert found == pytest.approx(seen[: found.size], rel=1e-4, abs=1e-4)
    assert seen[found.size :] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("count", [3, 4])
def test_under_a_causal_mask_each_token_answers_for_itself(count):
    rng = np.random.default_rng(count)
    x = unit(rng.standard_normal((count, count)))
    values = values_for(x, causal(count), rng.uniform(0.5, 2.0, count))
    whole, own = local_multipliers(x, causal(count), values), token_multipliers(x, causal(count), values)
    assert own.max() == pytest.approx(whole[0], rel=1e-6)
    for one in own:
        assert np.abs(whole - one).min() < 1e-6 * whole[0]


# ------------------------------------------------------------ where starts end


@pytest.mark.parametrize(("width", "a", "low", "high"), [(3, 0.2, 0.05, 0.15), (6, 0.5, 0.01, 0.06)])
def test_values_with_two_diagonals_leave_some_starts_at_rank_two_and_none_higher(width, a, low, high):
    values = bidiagonal_values(width, a, 1.0)
    assert np.array_equal(values[-2:, -2:], two_token_values(a, 1.0))
    shares = rank_shares(width, causal(width), values, samples=1000, seed=0, layers=300)
    assert low < shares[1].value < high
    assert [share.value for share in shares[2:]] == [0.0] * (width - 2)
    assert sum(share.value for share in shares) == pytest.approx(1.0)
    assert shares[1].stderr == pytest.approx(math.sqrt(shares[1].value * (1 - shares[1].value) / 1000))


def test_equal_seeds_give_equal_shares_and_samples_do_not_touch_one_another():
    x, attention, values = rank_three()
    first, again = (basin(x, attention, values, perturbation=1e-3, samples=50, seed=3, layers=50) for _ in range(2))
    assert first == again
    starts = np.random.default_rng(1).standard_normal((5, 3, 3))
    together = limits(starts, attention, values, layers=7)
    for start, end in zip(starts, together, strict=True):
        alone = unit(start)
        for _ in range(7):
            alone = one_layer_by_loops(alone, attention, values)
        assert end == pytest.approx(alone, abs=1e-9)


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: values_for(np.ones((2, 3)), np.eye(2), 1.0), "must be independent: their rank is 1"),
        (lambda: values_for(np.eye(3, 2), np.eye(3), 1.0), "must be independent: their rank is 2"),
        (lambda: values_for(np.eye(2), np.full((2, 2), 0.5), 1.0), "must be invertible"),
        (lambda: values_for(np.eye(2), np.eye(3), 1.0), r"must be invertible, of shape \(2, 2\)"),
        (lambda: values_for(np.eye(2), np.eye(2), [1.0, -1.0]), "must be positive"),
        (lambda: local_multipliers(np.eye(2), np.full((2, 2), 0.5), np.eye(2)), "must be an equilibrium"),
    ],
)
def test_what_cannot_be_an_equilibrium_is_refused_in_one_sentence(call, says):
    with pytest.raises(TheoryError, match=says):
        call()


def test_mirrored_tokens_are_an_equilibrium_with_the_same_multipliers():
    x, attention, values = rank_three()
    mirrored, own = (local_multipliers(one, attention, values) for one in (-x, x))
    assert mirrored == pytest.approx(own, rel=1e-9)
