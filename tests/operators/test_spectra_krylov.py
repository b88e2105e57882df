"""Leading singular values of any linear operator equal the factorisation's, on spectra that are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fullrank.errors import ShapeError
from fullrank.operators.krylov import leading_singular_values
from fullrank.operators.linear import Centred, Matrix, MatrixFree, Restricted
from fullrank.operators.orthonormal import orthonormalise


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma, m=160, n=140, seed=0):
    """A matrix of random singular vectors and the given leading singular values, zeros after them."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    U = torch.linalg.qr(randn(m, len(sigma), seed=seed)).Q
    V = torch.linalg.qr(randn(n, len(sigma), seed=seed + 1)).Q
    return (U * sigma) @ V.mT


KNOWN = {
    "one large, the rest clustered at one": [3.0, *[1.0 - 1e-3 * i for i in range(60)]],
    "a tiny gap": [1.0, 1.0 - 1e-9, 0.5, 0.25],
    "a slow power law": [1 / (1 + i) ** 0.5 for i in range(100)],
    "rank one": [2.0],
    "a second value far below the first": [1.0, 1e-3, 1e-4, 1e-5],
    "all equal": [1.0] * 140,
}


@pytest.mark.parametrize("sigma", KNOWN.values(), ids=KNOWN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_spectra_are_found_within_one_percent(sigma, dtype):
    A = with_spectrum(sigma).to(dtype)
    found = leading_singular_values(Matrix(A), 2, max_iterations=40)
    true = torch.linalg.svdvals(A.double())[:2]
    assert bool(found.exact)
    assert bool(((found.singular_values.double() - true).abs() <= 1e-2 * true + 1e-5 * true[0]).all())


def test_a_small_tolerance_gives_the_factorisations_digits():
    A = randn(200, 150)
    found = leading_singular_values(Matrix(A), 3, tolerance=1e-12, max_iterations=60)
    assert_close(found.singular_values, torch.linalg.svdvals(A)[:3], rtol=1e-9, atol=0)
    assert float(found.residuals.max()) < 1e-4


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 90), n=st.integers(1, 90), seed=st.integers(0, 99))
def test_small_operators_are_factorised_exactly(m, n, seed):
    A = randn(m, n, seed=seed)
    k = min(m, n, 2)
    found = leading_singular_values(Matrix(A), k)
    if min(m, n) <= 64:
        assert found.iterations == 0
        assert_close(found.singular_values, torch.linalg.svdvals(A)[:k], rtol=1e-10, atol=1e-12)
    else:
        assert_close(found.singular_values, torch.linalg.svdvals(A)[:k], rtol=1e-2, atol=0)
    assert bool(found.exact)


def test_values_are_lower_bounds_and_grow_with_the_iterations():
    A = randn(300, 300)
    true = torch.linalg.svdvals(A)[:2]
    last = torch.zeros(2, dtype=torch.float64)
    for cap in range(1, 9):
        found = leading_singular_values(Matrix(A), 2, tolerance=0.0, max_iterations=cap)
        assert found.iterations == cap
        assert bool((found.singular_values <= true * (1 + 1e-12)).all())
        assert bool((found.singular_values >= last * (1 - 1e-12)).all())
        last = found.singular_values


def test_the_cap_is_declared():
    found = leading_singular_values(Matrix(randn(300, 300)), 2, max_iterations=1)
    assert not bool(found.exact)
    assert found.iterations == 1


@pytest.mark.parametrize("cap", [3, 4])
def test_a_residual_is_the_distance_to_a_singular_value_at_most(cap):
    A = randn(200, 180)
    true = torch.linalg.svdvals(A)
    found = leading_singular_values(Matrix(A), 3, tolerance=0.0, max_iterations=cap)
    nearest = (found.singular_values[:, None] - true).abs().amin(-1)
    assert bool((nearest <= found.residuals + 1e-12).all())


def test_every_matrix_of_a_batch_has_its_own_answer():
    A = randn(2, 3, 130, 120) * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)[:, None, None]
    found = leading_singular_values(Matrix(A), 2, tolerance=1e-5)
    assert found.singular_values.shape == (2, 3, 2)
    assert found.exact.shape == (2, 3)
    assert_close(found.singular_values, torch.linalg.svdvals(A)[..., :2], rtol=1e-3, atol=0)


def test_zero_maps_have_zero_values_and_do_not_disturb_their_neighbours():
    A = randn(3, 150, 150)
    A[1] = 0
    found = leading_singular_values(Matrix(A), 2, tolerance=1e-6)
    assert_close(found.singular_values[1], torch.zeros(2, dtype=torch.float64))
    assert_close(found.singular_values[2], torch.linalg.svdvals(A[2])[:2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [20, 150])
def test_a_map_that_is_not_finite_is_nan_and_its_neighbours_are_not(size):
    A = randn(2, size, size)
    A[0, 3, 4] = torch.nan
    found = leading_singular_values(Matrix(A), 2, tolerance=1e-6)
    assert bool(found.singular_values[0].isnan().all())
    assert not bool(found.exact[0])
    assert_close(found.singular_values[1], torch.linalg.svdvals(A[1])[:2], rtol=1e-4, atol=0)


def test_products_are_all_that_is_needed():
    A = randn(150, 170)
    shifted = MatrixFree((150, 170), lambda V: A @ V + 1, lambda U: A.mT @ U + 1, dtype=torch.float64)
    wrapped = MatrixFree((150, 170), lambda V: A @ V, lambda U: A.mT @ U, dtype=torch.float64)
    assert shifted.shape == wrapped.shape
    assert_close(
        leading_singular_values(wrapped, 2).singular_values, leading_singular_values(Matrix(A), 2).singular_values
    )


def test_a_good_start_saves_products():
    A = with_spectrum([3.0, 2.0, *[1.0] * 100])
    U = torch.linalg.svd(A).U[:, :16]
    near = leading_singular_values(Matrix(A), 2, start=U)
    assert near.iterations == 2
    assert_close(near.singular_values, torch.tensor([3.0, 2.0], dtype=torch.float64), rtol=1e-9, atol=0)


def test_equal_seeds_give_equal_bits_and_the_global_generator_is_not_drawn_from():
    A = Matrix(randn(200, 200))
    state = torch.random.get_rng_state()
    first, second = (leading_singular_values(A, 2, seed=3) for _ in range(2))
    assert torch.equal(first.singular_values, second.singular_values)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_matrices_are_multiplied_in_float32():
    A = randn(100, 100).to(torch.bfloat16)
    found = leading_singular_values(Matrix(A), 2, tolerance=1e-5)
    assert found.singular_values.dtype == torch.float32
    assert_close(found.singular_values.double(), torch.linalg.svdvals(A.double())[:2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [0, 5])
def test_an_impossible_number_of_values_is_answered_in_a_sentence(k):
    with pytest.raises(ShapeError, match="expected 1 ≤ k ≤ 4"):
        leading_singular_values(Matrix(randn(4, 6)), k)


def test_restriction_gives_the_singular_values_of_the_submatrix():
    A = randn(2, 90, 80)
    rows, columns = torch.arange(90) % 3 > 0, torch.arange(80) % 2 > 0
    operator = Restricted(Matrix(A), rows[None], columns[None])
    U = randn(2, 90, 4)
    V = randn(2, 80, 4)
    assert_close((operator.matmat(V) * U).sum(), (operator.rmatmat(U) * V).sum())
    found = leading_singular_values(operator, 2, tolerance=1e-8)
    assert_close(found.singular_values, torch.linalg.svdvals(A[:, rows][:, :, columns])[:, :2], rtol=1e-5, atol=0)


def test_centring_removes_the_mean_over_the_rows_that_stay():
    A = randn(1, 90, 80)
    rows = torch.arange(90) >= 40
    operator = Centred(Restricted(Matrix(A), rows[None]), rows[None])
    late = A[:, rows]
    true = torch.linalg.svdvals(late - late.mean(-2, keepdim=True))[:, :1]
    U, V = randn(1, 90, 4), randn(1, 80, 4)
    assert_close((operator.matmat(V) * U).sum(), (operator.rmatmat(U) * V).sum())
    assert_close(leading_singular_values(operator, 1, tolerance=1e-8).singular_values, true, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    rank=st.integers(0, 8),
    width=st.integers(1, 8),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_basis_is_orthonormal_spans_what_it_should_and_fills_up_with_zeros(rank, width, scale, dtype, seed):
    Y = (randn(60, rank, seed=seed) @ randn(rank, width, seed=seed + 1)).to(dtype) * scale
    B = torch.linalg.qr(randn(60, 5, seed=seed + 2)).Q.to(dtype)
    Q = orthonormalise(Y, [B])
    tight = 1e-4 if dtype == torch.float32 else 1e-9
    G = (Q.mT @ Q).double()
    nonzero = Q.norm(dim=0) > 0
    assert int(nonzero.sum()) == min(rank, width)
    assert_close(G, torch.diag(nonzero.double()), rtol=0, atol=tight)
    assert_close((B.mT @ Q).double(), torch.zeros(5, width, dtype=torch.float64), rtol=0, atol=tight)
    outside = Y - B @ (B.mT @ Y)
    assert_close(Q @ (Q.mT @ outside), outside, rtol=1e-3, atol=1e-4 * scale)
