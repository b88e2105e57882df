"""The random energy model: exact integrals against sampled softmax rows, limits against their formulas."""

import numpy as np
import pytest

from fullrank.theory import random_energy
from golden import assert_golden

RNG = np.random.default_rng(20)


def _rows(s: float, keys: int, rows: int) -> np.ndarray:
    logits = s * RNG.standard_normal((rows, keys))
    A = np.exp(logits - logits.max(1, keepdims=True))
    return A / A.sum(1, keepdims=True)


def _gauge(b: float | list[float], keys: int) -> np.ndarray:
    return np.asarray(b) * np.sqrt(np.log(keys))


def test_the_finite_context_table_meets_the_golden_participation():
    b = [0.5, 0.9, 1.0, np.sqrt(2), 2.0, 5.0]
    assert_golden("gg-rem-y2", random_energy.inverse_participation(_gauge(b, 512), 512))


def test_participation_falls_with_context_as_the_golden_numbers_do():
    keys = np.array([128, 512, 2048, 8192])
    assert_golden("gg-rem-finite-size", random_energy.inverse_participation(0.5 * np.sqrt(np.log(keys)), keys))


def test_row_entropy_meets_the_golden_numbers():
    b = [0.25, 1.0, np.sqrt(2), 3.0]
    assert_golden("gg-rem-entropy", random_energy.row_entropy(_gauge(b, 512), 512) / np.log(512))


def test_the_limit_vanishes_up_to_the_square_root_of_two():
    assert_golden("gg-rem-asymptotic", random_energy.inverse_participation_limit([1, np.sqrt(2), 1.7, 2, 3, 5]))


@pytest.mark.parametrize(("s", "keys"), [(0.7, 24), (1.5, 300), (3.0, 60), (8.0, 200)])
def test_moments_and_entropy_are_those_of_sampled_rows(s: float, keys: int):
    A = _rows(s, keys, 8000)
    for order in (2, 3):
        sampled = (A**order).sum(1)
        error = sampled.std() / np.sqrt(len(A))
        assert abs(random_energy.participation_moment(order, s, keys) - sampled.mean()) < 4 * error
    entropy = -(A * np.log(np.maximum(A, 1e-300))).sum(1)
    found = random_energy.row_entropy_exact(s, keys)
    assert abs(found - entropy.mean()) < 4 * entropy.std() / np.sqrt(len(A))


def test_the_table_is_the_integral():
    s, keys = 24 * RNG.uniform(size=40) ** 2, np.exp(RNG.uniform(np.log(2), 14, 40))
    exact = random_energy.participation_moment(2, s, keys)
    np.testing.assert_allclose(random_energy.inverse_participation(s, keys), exact, rtol=1e-2)
    entropy = random_energy.row_entropy_exact(s, keys) / np.log(keys)
    np.testing.assert_allclose(random_energy.row_entropy(s, keys) / np.log(keys), entropy, atol=2e-3)


def test_many_keys_at_once_are_the_same_as_few():
    s, keys = np.linspace(0, 9, 200), np.exp(np.linspace(0.7, 13, 200))
    together = random_energy.inverse_participation(s, keys)
    alone = [random_energy.inverse_participation(one, n) for one, n in zip(s, keys, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_rows_without_logits_are_uniform_and_of_huge_ones_single():
    assert random_energy.inverse_participation(0.0, 50) == pytest.approx(1 / 50, rel=1e-3)
    assert random_energy.row_entropy(0.0, 50) == pytest.approx(np.log(50), rel=1e-4)
    assert random_energy.inverse_participation(1e6, 50) == pytest.approx(1, abs=1e-4)
    assert random_energy.row_entropy(1e6, 50) == pytest.approx(0, abs=1e-3)
    assert random_energy.inverse_participation(3.0, 1) == pytest.approx(1)


def test_small_logits_give_the_exponential_of_their_variance():
    assert random_energy.inverse_participation(0.3, 1e5) == pytest.approx(np.exp(0.09) / 1e5, rel=1e-3)


@pytest.mark.parametrize("b", [2.0, 4.0])
def test_moments_in_the_limit_are_those_of_sampled_poisson_dirichlet_weights(b: float):
    m = random_energy.TRANSITION / b
    points = np.cumsum(RNG.exponential(size=(4000, 3000)), 1) ** (-1 / m)
    A = points / points.sum(1, keepdims=True)
    for order in (2, 3):
        sampled = (A**order).sum(1)
        limit = random_energy.participation_moment_limit(order, b)
        assert abs(limit - sampled.mean()) < 4 * sampled.std() / np.sqrt(len(A)) + 2e-3
    assert random_energy.participation_moment_limit(2, b) == pytest.approx(random_energy.inverse_participation_limit(b))


def test_moments_at_finite_keys_tend_to_the_limit():
    for order in (2, 3):
        limit = random_energy.participation_moment_limit(order, 4.0)
        errors = [abs(random_energy.participation_moment(order, _gauge(4.0, n), n) - limit) for n in (10**2, 10**6)]
        assert errors[1] < 0.7 * errors[0]
    assert random_energy.participation_moment_limit(2, 1.0) == 0


@pytest.mark.parametrize(("s", "keys"), [(1.0, 40), (4.0, 400)])
def test_the_second_moment_of_participation_is_that_of_sampled_rows(s: float, keys: int):
    sampled = np.square(np.square(_rows(s, keys, 8000)).sum(1))
    found = random_energy.participation_variance_moment(s, keys)
    assert abs(found - sampled.mean()) < 4 * sampled.std() / np.sqrt(len(sampled))


@pytest.mark.parametrize(("s", "keys"), [(0.5, 64), (1.0, 500), (2.0, 64), (4.0, 128)])
@pytest.mark.parametrize("r", [0.1, 0.5, 0.9])
def test_rows_of_correlated_logits_overlap_as_simulated(s: float, keys: int, r: float):
    shared = RNG.standard_normal((3000, keys))

    def rows() -> np.ndarray:
        logits = s * (np.sqrt(r) * shared + np.sqrt(1 - r) * RNG.standard_normal(shared.shape))
        A = np.exp(logits - logits.max(1, keepdims=True))
        return A / A.sum(1, keepdims=True)

    simulated = (rows() * rows()).sum(1).mean()
    Y2 = random_energy.inverse_participation(s, keys)
    assert random_energy.row_overlap(Y2, r, keys) == pytest.approx(simulated, rel=1 / 6)


@pytest.mark.parametrize(("s", "keys", "head_width"), [(1.0, 256, 16), (2.0, 128, 32), (4.0, 128, 64)])
def test_all_queries_prefer_the_long_keys_of_narrow_heads(s: float, keys: int, head_width: int):
    found = []
    for _ in range(40):
        q, k = RNG.standard_normal((2, keys, head_width))
        logits = s * q @ k.T / np.sqrt(head_width)
        A = np.exp(logits - logits.max(1, keepdims=True))
        A /= A.sum(1, keepdims=True)
        found.append((np.square(A.sum(0)).sum() - np.square(A).sum()) / (keys * (keys - 1)))
    Y2 = random_energy.inverse_participation(s, keys)
    assert random_energy.row_overlap(Y2, 0.0, keys, head_width=head_width) == pytest.approx(np.mean(found), rel=0.1)


def test_equal_rows_overlap_by_their_participation():
    assert random_energy.row_overlap(0.3, 1.0, 100, head_width=8) == pytest.approx(0.3)
    assert random_energy.row_overlap(0.01, 0.0, 100) == pytest.approx(0.01)
