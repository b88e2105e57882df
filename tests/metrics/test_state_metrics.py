"""Every metric of states equals its definition written with loops, whatever the dtype, the batch and the padding."""

import math

import pytest
import torch

import fullrank.metrics as metrics
from fullrank.errors import BatchError
from fullrank.metrics.accumulate import real_tokens
from oracles import states

ONE = ("rms", "similarity", "residual", "channel_entropy", "max_to_median", "max_abs", "max_abs_position")
TWO = ("update_share", "neighbour_cosine", "identity_distance", "span_novelty")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def batch(generator, dtype=torch.float64, shape=(3, 7, 9), shift=0.4):
    X = torch.randn(shape, generator=generator, dtype=torch.float64) + shift
    mask = torch.rand(shape[:-1], generator=generator) > 0.3
    mask[..., :3] = True
    return X.to(dtype), mask


def real(X, mask):
    return [x[m].double() for x, m in zip(X, mask, strict=True)]


def close(found, expected, dtype=torch.float64):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE)
def test_a_metric_of_one_state_equals_its_definition(name, dtype, generator):
    X, mask = batch(generator, dtype)
    naive = getattr(states, name)
    close(getattr(metrics, name)(X, mask), [naive(x) for x in real(X, mask)], dtype)
    close(getattr(metrics, name)(X), [naive(x.double()) for x in X], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TWO)
def test_a_metric_of_two_states_equals_its_definition(name, dtype, generator):
    X, mask = batch(generator, dtype)
    other, _ = batch(generator, dtype)
    expected = [getattr(states, name)(x, y) for x, y in zip(real(X, mask), real(other, mask), strict=True)]
    close(getattr(metrics, name)(X, other, mask), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distinct_counts_pairs_that_differ_in_the_dtype_they_came_in(dtype, generator):
    X, mask = batch(generator, dtype, shape=(3, 9, 4))
    X[:, 4] = X[:, 1]
    X[:, 5] = X[:, 1]
    X[0, 6] = 0.0
    X[0, 7] = -X[0, 6]  # minus zero is zero
    mask[:, 4:8] = True
    close(metrics.distinct_at_dtype(X, mask), [states.distinct_at_dtype(x) for x in real(X, mask)], dtype)


def test_tokens_that_float32_tells_apart_can_be_one_in_bfloat16():
    X = torch.tensor([[1.0, 1.0], [1.0, 1.001], [1.0, 3.0]])
    assert metrics.distinct_at_dtype(X) == 1
    assert metrics.distinct_at_dtype(X.bfloat16()) == pytest.approx(2 / 3)


def test_the_largest_entry_is_exact_in_every_dtype_and_unknown_where_one_is_not_a_number(generator):
    X = torch.randn(2, 5, 4, generator=generator)
    X[0, 3, 1] = -60_000.0
    for dtype in DTYPES:
        assert metrics.max_abs(X.to(dtype))[0] == X.to(dtype)[0, 3, 1].abs().double()
        assert metrics.max_abs_position(X.to(dtype))[0] == 3
    X[1, 0, 0] = torch.nan
    assert metrics.max_abs(X)[1].isnan() and metrics.max_abs_position(X)[1].isnan()
    X[0, 1, 1] = -torch.inf
    assert metrics.max_abs(X)[0] == torch.inf and metrics.max_abs_position(X)[0] == 1


def test_the_position_of_the_largest_entry_counts_real_tokens_however_they_are_padded(generator):
    X = torch.randn(1, 4, 3, generator=generator)
    X[0, 2, 0] = 50.0
    left = torch.cat([torch.full((1, 3, 3), 99.0), X], 1)
    mask = torch.arange(7)[None] >= 3
    assert metrics.max_abs_position(left, mask) == metrics.max_abs_position(X) == 2
    assert metrics.max_abs(left, mask) == 50


def test_span_novelty_is_unknown_where_the_tokens_may_span_everything(generator):
    X = torch.randn(2, 6, 6, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    found = metrics.span_novelty(X, X, mask)
    assert found[0].isnan()
    assert found[1] < 1e-10


def test_a_basis_at_hand_gives_the_same_span_novelty(generator):
    X, mask = batch(generator, torch.float32)
    X_0, _ = batch(generator, torch.float32)
    basis = metrics.row_space(X_0, mask)
    assert torch.equal(metrics.span_novelty(X, X_0, mask, basis=basis), metrics.span_novelty(X, X_0, mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_metrics_equal_their_definitions(dtype, generator):
    X, mask = batch(generator, dtype)
    sequences = real(X, mask)
    close(torch.stack(metrics.energy_shares(X, mask)), states.shares(sequences), dtype)
    close(metrics.similarity_across(X, mask), states.similarity_across(sequences), dtype)
    close(metrics.similarity_standardized(X, mask), states.similarity_standardized(sequences), dtype)
    names = ("shared_energy", "sequence_energy", "token_energy")
    assert tuple(getattr(metrics, name)(X, mask) for name in names) == metrics.energy_shares(X, mask)


def test_features_that_do_not_vary_are_left_out_of_standardising(generator):
    X, mask = batch(generator, torch.float32)
    constant = torch.cat([X, torch.full_like(X[..., :2], 0.1)], -1)
    torch.testing.assert_close(
        metrics.similarity_standardized(constant, mask), metrics.similarity_standardized(X, mask), rtol=1e-5, atol=1e-5
    )


def test_one_sequence_cannot_tell_shared_from_its_own(generator):
    X, _ = batch(generator, shape=(1, 5, 4))
    shared, sequence, token = metrics.energy_shares(X)
    assert shared.isnan()
    assert sequence.isnan()
    assert float(token) == pytest.approx(states.shares([X[0]])[2])
    assert metrics.similarity_across(X).isnan()


def test_tokens_without_a_direction_enter_no_pair(generator):
    X, _ = batch(generator, shape=(5, 4))
    with_zero = torch.cat([X, torch.zeros(2, 4, dtype=X.dtype)])
    assert float(metrics.similarity(with_zero)) == pytest.approx(float(metrics.similarity(X)))
    assert float(metrics.similarity(with_zero)) == pytest.approx(states.similarity(with_zero))


ALL_OF_ONE = (
    *ONE,
    "distinct_at_dtype",
    "orthogonality_gap",
    "isometry_gap",
    "intrinsic_dimension",
    "stable_rank",
    "centered_effective_rank",
    "centered_numerical_rank",
    "soft_rank",
)


@pytest.mark.parametrize("name", ALL_OF_ONE)
def test_what_stands_in_padded_tokens_does_not_matter(name, generator):
    X, mask = batch(generator, torch.float32)
    spoilt = torch.where(mask[..., None], X, torch.nan)
    metric = getattr(metrics, name)
    torch.testing.assert_close(metric(spoilt, mask), metric(torch.where(mask[..., None], X, 0), mask), equal_nan=True)


@pytest.mark.parametrize("name", ALL_OF_ONE)
@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 1, 4), (0, 3, 4), (3, 4)])
def test_small_and_empty_states_give_a_number_or_nan_and_no_exception(name, shape, generator):
    X = torch.randn(shape, generator=generator)
    assert getattr(metrics, name)(X).shape == shape[:-2]
    masked = getattr(metrics, name)(X, torch.zeros(shape[:-1], dtype=torch.bool))
    assert bool(masked.isnan().all())


@pytest.mark.parametrize("name", ["similarity", "residual", "distinct_at_dtype", "intrinsic_dimension"])
def test_one_token_is_not_enough_for_a_number_of_pairs(name):
    assert getattr(metrics, name)(torch.ones(1, 3)).isnan()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", [*ALL_OF_ONE, "rms"])
def test_float32_squares_that_would_overflow_or_vanish_do_not(name, scale, generator):
    X, mask = batch(generator, torch.float32)
    expected = getattr(metrics, name)(X, mask) * (scale if name in ("rms", "max_abs") else 1)
    torch.testing.assert_close(getattr(metrics, name)(X * scale, mask), expected, rtol=2e-5, atol=1e-40)


def test_a_non_finite_state_gives_nan_and_no_exception(generator):
    X, mask = batch(generator, torch.float32)
    X[0, 0, 0] = torch.inf
    for name in ("residual", "stable_rank", "centered_soft_rank", "orthogonality_gap", "isometry_gap"):
        found = getattr(metrics, name)(X, mask)
        assert found[0].isnan(), name
        assert not found[1].isnan(), name


def test_a_mask_of_another_shape_is_answered_in_one_sentence():
    with pytest.raises(BatchError, match=r"mask has shape \(2, 4\); for X of shape \(2, 3, 5\) it must be \(2, 3\)"):
        real_tokens(torch.zeros(2, 3, 5), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(BatchError, match="at least one entry"):
        real_tokens(torch.zeros(2, 3, 0), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_floor_lies_above_what_rounding_leaves_of_identical_tokens(dtype, generator):
    """A post-norm stack of collapsed tokens: attention, skip, norm, every write rounded to the run's dtype."""
    T, d = 32, 64
    X = torch.randn(1, d, generator=generator).expand(T, d).to(dtype)
    for _ in range(12):
        W, Q = (torch.randn(d, d, generator=generator) / math.sqrt(d) for _ in range(2))
        A = torch.randn(T, T, generator=generator).softmax(-1)
        branch = ((A.to(dtype) @ X) @ W.to(dtype)) @ Q.to(dtype)
        X = torch.nn.functional.layer_norm((X + branch).to(dtype), (d,))
    assert X.dtype == dtype
    plateau = float(metrics.residual(X))
    assert plateau < metrics.floor(dtype)
    if dtype == torch.float32:  # 16-bit tokens end up equal to the last bit
        assert metrics.floor(dtype) < 30 * plateau


def test_one_channel_has_no_entropy_over_channels():
    assert metrics.channel_entropy(torch.ones(3, 1)).isnan()
