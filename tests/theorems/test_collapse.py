"""What must hold of any signal: between similarity, residual, energy and rank, at both ends and in between."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fullrank.metrics as metrics

RANKS = ("stable_rank", "gram_stable_rank", "effective_rank", "spectral_entropy_rank", "participation_ratio")
seeds = st.integers(0, 10_000)
sizes = st.integers(2, 12)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@given(seed=seeds, T=sizes, d=sizes)
@settings(deadline=None, max_examples=30)
def test_identical_tokens_have_similarity_one_and_residual_zero(seed, T, d):
    X = normal(seed, 1, d).expand(T, d)
    close(metrics.similarity(X), 1)
    assert metrics.residual(X) == 0
    assert metrics.residual(X.float()) < 1e-12
    assert metrics.distinct_at_dtype(X) == 0
    assert metrics.numerical_rank(X) == 1
    assert metrics.centered_numerical_rank(X) == 0
    for name in RANKS:
        close(getattr(metrics, name)(X), 1, 1e-6)


@given(seed=seeds, T=sizes, d=sizes)
@settings(deadline=None, max_examples=30)
def test_for_tokens_of_equal_length_the_residual_follows_from_the_similarity(seed, T, d):
    """Residual = √((1 − 1/T)(1 − ρ)); hence ρ = 1 exactly when the residual is 0."""
    X = normal(seed, T, d) + 0.5
    X = X / X.norm(dim=-1, keepdim=True)
    predicted = ((1 - 1 / T) * (1 - metrics.similarity(X))).clamp(min=0).sqrt()
    close(metrics.residual(X), predicted, 1e-7)


@given(seed=seeds, S=st.integers(2, 4), T=st.integers(2, 6), d=sizes, shift=st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_energy_shares_add_to_one_and_lie_between(seed, S, T, d, shift):
    X = normal(seed, S, T, d) + shift
    mask = normal(seed + 1, S, T) > -0.5
    mask[:, 0] = True
    shares = torch.stack(metrics.energy_shares(X, mask))
    close(shares.sum(), 1, 1e-12)
    assert bool(((shares >= 0) & (shares <= 1)).all())


def test_each_share_of_energy_has_a_batch_that_consists_of_it():
    token = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    sequence = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    shared = torch.ones(2, 2, 2)
    assert tuple(metrics.energy_shares(shared)) == (1, 0, 0)
    assert tuple(metrics.energy_shares(sequence)) == (0, 1, 0)
    assert tuple(metrics.energy_shares(token)) == (0, 0, 1)


@given(seed=seeds, T=sizes, d=sizes)
@settings(deadline=None, max_examples=20)
def test_in_one_sequence_token_energy_is_the_squared_residual(seed, T, d):
    X = normal(seed, 1, T, d) + 1
    close(metrics.token_energy(X), metrics.residual(X)[0].square())


def test_similarity_within_and_across_tell_a_shared_bias_from_a_sentence_signal():
    bias = torch.ones(3, 4, 64) * 3
    sentence = normal(0, 3, 1, 64).float().expand(3, 4, 64) * 3
    noise = normal(1, 3, 4, 64).float()
    assert metrics.similarity(noise + bias).min() > 0.8
    assert metrics.similarity_across(noise + bias) > 0.8
    assert metrics.similarity_standardized(noise + bias).max() < 0.1
    assert metrics.similarity(noise + sentence).min() > 0.8
    assert metrics.similarity_across(noise + sentence) < 0.3


def test_antipodal_tokens_are_as_dissimilar_as_tokens_can_be():
    X = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    close(metrics.similarity(X), -1)
    close(metrics.residual(X), 1)


@given(seed=seeds, T=sizes, d=sizes)
@settings(deadline=None, max_examples=30)
def test_orthogonal_tokens_of_equal_length_have_every_rank_full(seed, T, d):
    T = min(T, d)
    X = torch.linalg.qr(normal(seed, d, T)).Q.T
    for name in (*RANKS, "numerical_rank"):
        close(getattr(metrics, name)(X), T, 1e-9)
    assert metrics.centered_numerical_rank(X) == T - 1
    close(metrics.similarity(X), 0)
    close(metrics.orthogonality_gap(X), 0)
    close(metrics.isometry_gap(X), 0)


@given(seed=seeds, T=sizes, d=sizes)
@settings(deadline=None, max_examples=30)
def test_the_ranks_are_ordered(seed, T, d):
    """Of one spectrum: 1 ≤ gram stable ≤ stable ≤ participation ≤ entropy rank ≤ effective rank ≤ numerical rank."""
    X = normal(seed, T, d)
    order = ["gram_stable_rank", "stable_rank", "spectral_entropy_rank", "effective_rank", "numerical_rank"]
    found = [1.0, *(float(getattr(metrics, name)(X)) for name in order)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(found))
    assert metrics.participation_ratio(X) <= metrics.spectral_entropy_rank(X) * (1 + 1e-9)
    assert metrics.stable_rank(X) <= metrics.participation_ratio(X) * (1 + 1e-9)


@given(seed=seeds, T=st.integers(3, 9), d=st.integers(3, 9))
@settings(deadline=None, max_examples=30)
def test_centring_lowers_the_numerical_rank_by_at_most_one(seed, T, d):
    X = normal(seed, T, 2) @ normal(seed + 1, 2, d) + normal(seed + 2, d)
    assert metrics.numerical_rank(X) - metrics.centered_numerical_rank(X) in (0, 1)


@pytest.mark.parametrize("rho", [0.1, 1 / 3, 0.9])
def test_a_shared_direction_drives_the_uncentred_rank_to_one_and_leaves_the_centred_alone(rho):
    """Gram stable rank → 1 + (1−ρ)²(1 + T/d)/(ρ²T), before any attention: always read both."""
    T, d = 400, 600
    X = math.sqrt(1 - rho) * normal(0, T, d) + math.sqrt(rho) * normal(1, d)
    rho_found = float(metrics.similarity(X))
    predicted = (1 - rho_found) ** 2 * (1 + T / d) / (rho_found**2 * T)
    assert float(metrics.gram_stable_rank(X)) - 1 == pytest.approx(predicted, rel=0.1)
    null, _ = metrics.null_value("gram_stable_rank", tokens=T - 1, width=d, sequences=1, draws=2)
    assert float(metrics.centered_gram_stable_rank(X)) == pytest.approx(null, rel=0.1)


@given(seed=seeds, T=st.integers(2, 8))
@settings(deadline=None, max_examples=20)
def test_mixing_the_input_tokens_creates_nothing_outside_their_span(seed, T):
    """Attention with W_OV ∝ I stays inside; a generic W_OV does not."""
    X = normal(seed, T, 20)
    A = normal(seed + 1, T, T).softmax(-1)
    assert metrics.span_novelty(X + A @ X, X) < 1e-20
    assert metrics.span_novelty(X + A @ X @ normal(seed + 2, 20, 20), X) > 0.05


@given(seed=seeds, factor=st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_a_block_that_only_rescales_has_neighbour_cosine_one(seed, factor):
    X = normal(seed, 6, 5)
    close(metrics.neighbour_cosine(factor * X, X), 1)
    close(metrics.update_share(factor * X, X), abs(factor - 1))
    close(metrics.neighbourhood_overlap(factor * X, X), 1)


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_update_share_and_cosine_obey_the_law_of_cosines(seed):
    X, Y = normal(seed, 6, 5), normal(seed + 1, 6, 5)
    ratio = X.norm() / Y.norm()
    close(metrics.update_share(X, Y).square(), 1 + ratio**2 - 2 * ratio * metrics.neighbour_cosine(X, Y))


def test_channel_entropy_is_one_for_equal_channels_and_zero_for_a_rogue_one():
    X = torch.ones(5, 8)
    assert metrics.channel_entropy(X) == pytest.approx(1)
    X[:, 1:] = 0
    assert metrics.channel_entropy(X) == 0
    X = torch.ones(5, 8)
    X[2, 3] = 1000
    assert metrics.max_to_median(X) == 1000


@given(seed=seeds, T=sizes)
@settings(deadline=None, max_examples=20)
def test_parallel_vectors_have_the_largest_orthogonality_gap(seed, T):
    X = normal(seed, 1, 6).expand(T, 6)
    close(metrics.orthogonality_gap(X), math.sqrt(1 - 1 / T))
    assert metrics.isometry_gap(X) > 5


@given(seed=seeds, n=st.integers(2, 8), d=st.integers(8, 12))
@settings(deadline=None, max_examples=30)
def test_normalising_every_vector_never_lowers_isometry(seed, n, d):
    """Joudaki et al. 2023: equality iff the norms agree."""
    X = normal(seed, n, d) * torch.exp(normal(seed + 1, n, 1))
    assert metrics.isometry_gap(X / X.norm(dim=-1, keepdim=True)) <= metrics.isometry_gap(X) + 1e-9


@given(seed=seeds, n=st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_layer_norm_keeps_the_rank_beyond_its_bias(seed, n):
    """Rank(LN(X) − 1βᵀ) = rank(XP) exactly, P the projection that centres features (head_channel, T1)."""
    X = normal(seed, n, 3) @ normal(seed + 1, 3, 10)
    gain, bias = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5, normal(3, 10)
    normed = torch.nn.functional.layer_norm(X, (10,), gain, bias)
    assert metrics.numerical_rank(normed - bias) == metrics.numerical_rank(X - X.mean(-1, keepdim=True))


@given(seed=seeds, n=st.integers(2, 8))
@settings(deadline=None, max_examples=20)
def test_rms_norm_keeps_the_rank(seed, n):
    X = normal(seed, n, 3) @ normal(seed + 1, 3, 10)
    normed = torch.nn.functional.rms_norm(X, (10,))
    assert metrics.numerical_rank(normed) == metrics.numerical_rank(X)


@given(seed=seeds, n=st.integers(3, 10), d=st.integers(2, 4))
@settings(deadline=None, max_examples=15)
def test_keys_of_equal_length_are_all_selectable(seed, n, d):
    K = normal(seed, n, d)
    assert metrics.unselectable_keys(K / K.norm(dim=-1, keepdim=True)) == 0


def test_the_mean_of_other_keys_is_never_selectable():
    corners = torch.eye(4, dtype=torch.float64)
    K = torch.cat([corners, corners.mean(0, keepdim=True)])
    assert metrics.unselectable_keys(K) == pytest.approx(1 / 5)


def test_an_invertible_output_projection_hides_no_head_and_a_narrow_readout_hides_all_but_one():
    """Kernel n (H d_k − rank): 0 for the full readout, n (H − 1) d_k for an observer with d_k outputs."""
    W_O = normal(0, 12, 12)
    full = metrics.head_ambiguity(W_O, heads=4, tokens=5)
    narrow = metrics.head_ambiguity(W_O, heads=4, tokens=5, readout=normal(1, 12, 3))
    assert full.degrees_of_freedom == 0
    assert narrow.degrees_of_freedom == 5 * (4 - 1) * 3
