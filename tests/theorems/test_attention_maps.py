"""What must hold of any attention map: identity, uniform, sink, permutation, and all that lies between."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fullrank.metrics as metrics

seeds = st.integers(0, 10_000)
T_range = st.integers(2, 10)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def uniform(visible):
    return visible.double() / visible.sum(-1, keepdim=True)


def close(found, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected.expand(found.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T", [2, 5, 16])
def test_identity_attention_has_no_gap(T):
    """Singular values s₁ = s₂ = 1: nothing is averaged; each query has its own key."""
    A = torch.eye(T, dtype=torch.float64)
    close(metrics.attention_s1(A), 1)
    close(metrics.attention_s2(A), 1)
    close(metrics.outlier_share(A), 1 / T)
    close(metrics.attention_stable_rank(A), T)
    close(metrics.uniform_distance(A), 1)
    close(metrics.smoothing_gain(A), 1)
    close(metrics.entropy(A), 0)
    close(metrics.effective_keys(A), 1)
    close(metrics.inverse_participation(A), 1)
    close(metrics.selectivity(A), math.log(T))
    close(metrics.sink_mass(A), 1 / T)


@pytest.mark.parametrize("T", [2, 5, 16])
def test_uniform_attention_has_rank_one(T):
    A = torch.full((T, T), 1 / T, dtype=torch.float64)
    close(metrics.attention_s1(A), 1)
    close(metrics.attention_s2(A), 0, 1e-7)
    close(metrics.outlier_share(A), 1)
    close(metrics.attention_stable_rank(A), 1)
    close(metrics.uniform_distance(A), 0)
    close(metrics.smoothing_gain(A), 0)
    close(metrics.branch_energy(A, normal(0, T, 3)), 0)
    close(metrics.contrast_gain(A, normal(0, T, 3)), 0)
    close(metrics.normalized_entropy(A), 1)
    close(metrics.effective_keys(A), T)
    close(metrics.inverse_participation(A), 1 / T)
    close(metrics.selectivity(A), 0)


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=30)
def test_plain_averaging_over_any_visible_keys_is_the_zero_of_every_distance_from_it(seed, T):
    visible = (normal(seed, T, T) > 0) | torch.eye(T, dtype=torch.bool)
    U = uniform(visible)
    close(metrics.uniform_distance(U, visible), 0)
    close(metrics.branch_energy(U, normal(seed + 1, T, 3), visible), 0)
    logits = torch.zeros(T, T, dtype=torch.float64)
    close(metrics.logit_std(logits, visible), 0)
    if int(visible.sum(-1).max()) > 1:
        close(metrics.normalized_entropy(U, visible), 1)


@pytest.mark.parametrize("T", [2, 5, 16])
def test_a_pure_sink_has_rank_one_and_the_largest_singular_value(T):
    """Low entropy and yet no selectivity: that is what tells a sink from a pointer."""
    A = torch.zeros(T, T, dtype=torch.float64)
    A[:, 1] = 1
    close(metrics.attention_s1(A), math.sqrt(T))
    close(metrics.attention_s2(A), 0)
    close(metrics.entropy(A), 0)
    close(metrics.selectivity(A), 0)
    close(metrics.sink_mass(A), 1)
    assert metrics.sink_position(A) == 1
    close(metrics.smoothing_gain(A), 0)
    close(metrics.contrast_gain(A, normal(0, T, 3)), 0)


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=20)
def test_a_permutation_is_as_selective_as_attention_can_be(seed, T):
    A = torch.eye(T, dtype=torch.float64)[torch.randperm(T, generator=torch.Generator().manual_seed(seed))]
    close(metrics.selectivity(A), math.log(T))
    close(metrics.attention_s2(A), 1)


@given(seed=seeds, T=T_range, sharpness=st.floats(0.01, 20))
@settings(deadline=None, max_examples=40)
def test_bounds_that_every_row_stochastic_map_keeps(seed, T, sharpness):
    A = (sharpness * normal(seed, T, T)).softmax(-1)
    s1, s2 = metrics.attention_s1(A), metrics.attention_s2(A)
    slack = 1e-9
    assert 1 - slack <= s1 <= math.sqrt(T) + slack
    assert s2 <= math.sqrt(T / 2) + slack
    assert metrics.selectivity(A) <= math.log(T) + slack
    assert 1 / T - slack <= metrics.sink_mass(A)
    assert metrics.effective_keys(A) >= metrics.entropy(A).exp() - slack  # Jensen
    assert metrics.inverse_participation(A) >= (-metrics.entropy(A)).exp() - slack  # collision entropy below Shannon's
    close(metrics.attention_stable_rank(A) * metrics.outlier_share(A), 1)


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=30)
def test_interlacing_subtracting_the_average_leaves_the_second_value_or_more(seed, T):
    """Weyl for a change of rank one: s₂(A) ≤ ‖(I − J)A‖₂ and s₂(A) ≤ ‖A − U‖₂ with full visibility."""
    A = normal(seed, T, T).softmax(-1)
    s2 = metrics.attention_s2(A)
    assert s2 <= metrics.smoothing_gain(A) + 1e-9
    assert s2 <= metrics.uniform_distance(A) + 1e-9


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=30)
def test_smoothing_gain_bounds_what_attention_does_to_differences_between_tokens(seed, T):
    """‖(I − J)AX‖ ≤ ‖(I − J)A‖₂ ‖(I − J)X‖, because A leaves constants alone."""
    A, X = normal(seed, T, T).softmax(-1), normal(seed + 1, T, 4)

    def apart(Y):
        return (Y - Y.mean(0)).norm()

    assert apart(A @ X) <= metrics.smoothing_gain(A) * apart(X) + 1e-9


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=20)
def test_subtracting_the_uniform_map_is_centring_the_values(seed, T):
    """(A − J)V = A(V − 1v̄ᵀ): so branch energy vanishes for values that are one."""
    A, V = normal(seed, T, T).softmax(-1), normal(seed + 1, T, 3)
    centered = V - V.mean(0)
    close(metrics.branch_energy(A, V), ((A @ centered).square().sum() / (A @ V).square().sum()))
    close(metrics.branch_energy(A, torch.ones(T, 3, dtype=torch.float64)), 0)


@given(seed=seeds, T=T_range)
@settings(deadline=None, max_examples=20)
def test_the_contrast_gain_is_at_most_the_smoothing_gain_and_does_not_see_the_mean_of_the_values(seed, T):
    A, V = normal(seed, T, T).softmax(-1), normal(seed + 1, T, 3)
    gain = metrics.contrast_gain(A, V)
    assert gain <= metrics.smoothing_gain(A) + 1e-9
    close(metrics.contrast_gain(A, V + 30.0), gain)
    close(metrics.contrast_gain(torch.eye(T, dtype=torch.float64), V), 1)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_of_values_that_know_nothing_of_the_map_the_contrast_gain_follows_from_the_participation(mask):
    """√(Y₂ − ‖c‖²), c the mean row; of late queries where attention is causal."""
    T, d = 128, 4000
    visible = causal(T) if mask == "causal" else torch.ones(T, T, dtype=torch.bool)
    late = torch.arange(T) >= T // 2 if mask == "causal" else None
    A = normal(0, 4, T, T).masked_fill(~visible, -1e30).softmax(-1)
    found = metrics.contrast_gain(A, normal(1, T, d), visible, late)
    c = metrics.column_mean(A, visible, late)
    expected = (metrics.inverse_participation(A, visible, late) - c.square().sum(-1)).sqrt()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_branch_energy_follows_from_the_participation_and_the_cosine_of_the_values(rho):
    T, d = 150, 3000
    A = normal(0, 20, T, T).softmax(-1)
    V = math.sqrt(1 - rho) * normal(1, T, d) + math.sqrt(rho) * normal(2, d)
    Y2 = float(metrics.inverse_participation(A).mean())
    found = float(metrics.branch_energy(A, V.expand(20, T, d)).mean())
    assert found == pytest.approx((1 - rho) * (Y2 - 1 / T) / (rho + (1 - rho) * Y2), rel=0.06)


def test_the_first_rows_of_causal_averaging_hide_its_collapse():
    """Over all rows s₁ creeps towards 2; what late queries do is seen by asking for them."""
    T = 400
    visible = causal(T)
    U = uniform(visible)
    late = torch.arange(T) >= T // 2
    assert 1.6 < metrics.attention_s1(U, visible) < 2
    close(metrics.entropy(U, visible), math.lgamma(T + 1) / T)
    assert metrics.outlier_share(U, visible, late) > 0.85
    assert metrics.outlier_share(U, visible) < 0.6


@given(seed=seeds, T=st.integers(4, 8))
@settings(deadline=None, max_examples=20)
def test_rows_left_out_and_keys_hidden_are_as_if_they_were_not_there(seed, T):
    A = normal(seed, T, T).softmax(-1)
    rows = torch.arange(T) >= 2
    for name in ("entropy", "selectivity", "sink_mass", "attention_s2", "smoothing_gain", "uniform_distance"):
        metric = getattr(metrics, name)
        close(metric(A, None, rows), metric(A[2:]))
    visible = torch.ones(T, T, dtype=torch.bool)
    visible[:, 0] = False
    seen = A[:, 1:] / A[:, 1:].sum(-1, keepdim=True)
    spoilt = torch.cat([torch.full((T, 1), torch.nan, dtype=torch.float64), seen], 1)
    for name in ("entropy", "normalized_entropy", "selectivity", "sink_mass", "attention_s2", "uniform_distance"):
        close(getattr(metrics, name)(spoilt, visible), getattr(metrics, name)(seen))


@given(seed=seeds, T=T_range, shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=20)
def test_a_shift_of_a_row_s_logits_changes_neither_their_spread_nor_the_gauge(seed, T, shift):
    S = normal(seed, T, T)
    close(metrics.logit_std(S + shift, None), metrics.logit_std(S), 1e-7)
    close(metrics.log_context_gauge(S + shift), metrics.logit_std(S) / math.sqrt(math.log(T)), 1e-7)
    close(metrics.max_logit(S + shift), float(S.max()) + shift)


@given(seed=seeds, heads=st.integers(2, 5))
@settings(deadline=None, max_examples=20)
def test_heads_that_write_the_same_have_similarity_one_and_orthogonal_ones_zero(seed, heads):
    one = normal(seed, 1, 4, 6)
    sizes = torch.rand(heads, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    close(metrics.head_similarity(one * sizes), 1)
    apart = torch.linalg.qr(normal(seed, 24, heads)).Q.T.reshape(heads, 4, 6)
    close(metrics.head_similarity(apart), 0)
