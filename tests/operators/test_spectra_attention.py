"""Spectra of attention maps: streaming, kept and dense ones agree with the definitions on the dense map in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fullrank.errors import ShapeError
from fullrank.metrics import maps
from fullrank.operators import AttentionOperator, Causal, DenseAttention, Full, Packed, Padding, SlidingWindow
from fullrank.operators.kept import keep, kept_bytes
from fullrank.operators.permuted import permuted
from fullrank.operators.spectra import attention_singular_values, attention_spectra, full_spectrum

MASKS = {
    "full": lambda T: Full(),
    "causal": lambda T: Causal(),
    "window": lambda T: SlidingWindow(max(2, T // 8)),
    "padded": lambda T: Padding(torch.arange(T) < torch.tensor([[T - T // 4], [T]])),
    "causal and padded": lambda T: Causal() & Padding(torch.arange(T) < torch.tensor([[T - T // 4], [T]])),
    "packed": lambda T: Packed((torch.arange(T) // (T // 3 + 1)).expand(2, -1)),
}


def qk(T, *, lead=(2, 3), width=16, spread=1.5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*lead, T, width, generator=g, dtype=dtype) * math.sqrt(spread) for _ in range(2))


def visible(mask, shape):
    block = mask.block(slice(0, shape[2]), slice(0, shape[3]), shape)
    return torch.ones(1, 1, *shape[2:], dtype=torch.bool) if block is None else block.expand(-1, -1, *shape[2:])


def assert_within_a_percent(found, true, s1):
    assert bool(((found.double() - true).abs() <= 1e-2 * true + 1e-5 * s1).all()), (found, true)


def assert_all_numbers(A, rows=None, **options):
    found = attention_spectra(A, rows=rows, **options)
    D, seen = A.dense().double(), visible(A.mask, A.shape)
    R = None if rows is None else rows[:, None]
    s1 = maps.attention_s1(D, seen, R)
    assert bool(found.exact.all())
    assert_within_a_percent(found.s[..., 0], s1, s1)
    assert_within_a_percent(found.s[..., 1], maps.attention_s2(D, seen, R), s1)
    assert_within_a_percent(found.uniform_distance, maps.uniform_distance(D, seen, R), s1)
    assert_within_a_percent(found.smoothing_gain, maps.smoothing_gain(D, seen, R), s1)
    return found


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("tokens", [24, 150, 530])
def test_every_number_is_that_of_the_definition(mask, tokens):
    q, k = qk(tokens, lead=(2, 2))
    assert_all_numbers(AttentionOperator(q, k, mask=mask(tokens)))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_only_the_asked_queries_count(mask):
    q, k = qk(150)
    late = torch.arange(150) >= 75
    assert_all_numbers(AttentionOperator(q, k, mask=mask(150)), late[None])


def test_queries_can_differ_between_sequences():
    q, k = qk(120)
    rows = torch.arange(120) >= torch.tensor([[0], [90]])
    assert_all_numbers(AttentionOperator(q, k, mask=Causal()), rows)


def test_columns_that_are_not_real_are_taken_out():
    q, k = qk(150)
    A = AttentionOperator(q, k)
    real = torch.arange(150) < torch.tensor([[100], [150]])
    found = attention_spectra(A, rows=real, columns=real)
    D = A.dense().double()
    for b in range(2):
        sub = D[b][:, real[b]][:, :, real[b]]
        true = torch.linalg.svdvals(sub)[:, :2]
        assert_within_a_percent(found.s[b], true, true[:, :1])
        centred = torch.linalg.svdvals(sub - sub.mean(-2, keepdim=True))[:, 0]
        assert_within_a_percent(found.smoothing_gain[b], centred, true[:, 0])


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
def test_from_near_uniform_to_near_one_hot_maps(spread, mask):
    q, k = qk(400, lead=(1, 2), spread=spread)
    assert_all_numbers(AttentionOperator(q, k, mask=mask))


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
def test_recomputed_maps_give_what_kept_ones_give(mask):
    q, k = qk(300, lead=(1, 2))
    A = AttentionOperator(q, k, mask=mask)
    one_map = kept_bytes(A)
    kept, recomputed = attention_spectra(A), attention_spectra(A, memory=one_map - 1)
    assert bool(recomputed.null_s2.isnan().all())
    for name in ("s", "uniform_distance", "smoothing_gain"):
        assert_close(getattr(recomputed, name), getattr(kept, name), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_that_a_model_made_go_through_the_same_code(dtype):
    q, k = qk(200)
    weights = AttentionOperator(q, k, mask=Causal()).dense().to(dtype)
    assert_all_numbers(DenseAttention(weights, visible=Causal()))


def test_a_learned_sink_takes_its_part_of_the_rows():
    q, k = qk(150)
    assert_all_numbers_with_row_sums(AttentionOperator(q, k, sink=torch.tensor([0.0, 3.0, 9.0])))


def assert_all_numbers_with_row_sums(A):
    found = assert_all_numbers(A)
    assert bool((found.s[:, 2, 0] < found.s[:, 0, 0]).all())


def test_grouped_heads_share_keys():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 150, 16, generator=g), torch.randn(1, 2, 150, 16, generator=g)
    assert_all_numbers(AttentionOperator(q, k))


@pytest.mark.parametrize("width", [4, 16, 100])
def test_narrow_and_wide_heads(width):
    q, k = qk(300, lead=(1, 2), width=width)
    assert_all_numbers(AttentionOperator(q, k, mask=Causal()))


def test_cross_attention_is_rectangular():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 90, 16, generator=g), torch.randn(1, 2, 170, 16, generator=g)
    assert_all_numbers(AttentionOperator(q, k))


def test_the_identity_has_all_values_one_and_uniform_attention_has_one():
    eye = torch.eye(140)[None, None]
    found = attention_spectra(DenseAttention(eye, visible=Full()))
    assert_close(found.s, torch.ones(1, 1, 2))
    assert_close(found.uniform_distance, torch.ones(1, 1))
    assert_close(found.smoothing_gain, torch.ones(1, 1))
    uniform = attention_spectra(AttentionOperator(torch.zeros(1, 1, 140, 4), torch.zeros(1, 1, 140, 4)))
    assert_close(uniform.s, torch.tensor([[[1.0, 0.0]]]))
    assert_close(uniform.uniform_distance, torch.zeros(1, 1))
    assert_close(uniform.smoothing_gain, torch.zeros(1, 1))


def test_a_pure_sink_has_rank_one_and_the_root_of_its_size():
    weights = torch.zeros(1, 1, 144, 144)
    weights[..., 0] = 1
    found = attention_spectra(DenseAttention(weights, visible=Full()))
    assert_close(found.s, torch.tensor([[[12.0, 0.0]]]), atol=1e-4, rtol=0)
    assert_close(found.smoothing_gain, torch.zeros(1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
def test_one_and_two_tokens(mask):
    one = attention_spectra(AttentionOperator(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), mask=mask))
    assert_close(one.s, torch.tensor([[[1.0, torch.nan]]]), equal_nan=True)
    assert_close(one.uniform_distance, torch.zeros(1, 1))
    assert_close(one.smoothing_gain, torch.zeros(1, 1))
    q = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    assert_all_numbers(AttentionOperator(q, torch.ones(1, 1, 2, 4), mask=mask))


def test_a_group_without_queries_is_nan():
    q, k = qk(20)
    rows = torch.zeros(2, 20, dtype=torch.bool)
    rows[1] = True
    found = attention_spectra(AttentionOperator(q, k), rows=rows)
    for name in ("s", "uniform_distance", "smoothing_gain", "null_s2"):
        assert bool(getattr(found, name)[0].isnan().all())
        assert not bool(getattr(found, name)[1].isnan().any())


def test_queries_that_see_nothing_are_out():
    q, k = qk(130)
    mask = Padding(torch.arange(130) < torch.tensor([[130], [0]]))
    found = attention_spectra(AttentionOperator(q, k, mask=mask))
    assert bool(found.s[1].isnan().all())
    assert not bool(found.s[0].isnan().any())


def test_no_values_asked_is_answered_in_a_sentence():
    with pytest.raises(ShapeError, match="at least 1"):
        attention_spectra(AttentionOperator(*qk(20)), leading=0)


def test_budgets_only_change_how_heads_are_grouped():
    q, k = qk(160)
    A = AttentionOperator(q, k, mask=Causal())
    numbers = [attention_singular_values(A, 2, memory=m, tolerance=1e-5) for m in (1 << 28, 600_000, 110_000)]
    for other in numbers[1:]:
        assert_close(other.singular_values, numbers[0].singular_values, rtol=1e-4, atol=0)


def test_equal_seeds_give_equal_bits_and_the_global_generator_is_not_drawn_from():
    A = AttentionOperator(*qk(200))
    state = torch.random.get_rng_state()
    first, second = (attention_spectra(A, seed=5) for _ in range(2))
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.null_s2, second.null_s2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_cap_is_declared():
    A = AttentionOperator(*qk(300, spread=9.0))
    assert not bool(attention_spectra(A, max_iterations=1).exact.any())


def test_the_full_spectrum_is_the_factorisation_of_the_submatrix():
    q, k = qk(60)
    A = AttentionOperator(q, k, mask=Causal())
    rows, real = torch.arange(60)[None] >= 30, torch.arange(60)[None] < 50
    D = A.dense().double()
    assert_close(full_spectrum(A, 1, 2), torch.linalg.svdvals(D[1, 2]))
    assert_close(full_spectrum(A, 1, 2, rows=rows, columns=real), torch.linalg.svdvals(D[1, 2, 30:, :50]))


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 99), tokens=st.integers(70, 140), shift=st.integers(1, 60))
def test_singular_values_do_not_depend_on_the_order_of_tokens(seed, tokens, shift):
    q, k = qk(tokens, lead=(1, 1), seed=seed, dtype=torch.float64)
    first = attention_spectra(AttentionOperator(q, k), tolerance=1e-10)
    second = attention_spectra(AttentionOperator(q.roll(shift, 2), k.flip(2)), tolerance=1e-10)
    for name in ("s", "uniform_distance", "smoothing_gain"):
        assert_close(getattr(first, name), getattr(second, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("tokens", [60, 560])
def test_a_kept_map_is_the_map(mask, tokens):
    q, k = qk(tokens, lead=(2, 2), dtype=torch.float64)
    A = AttentionOperator(q, k, mask=mask(tokens))
    kept, D = keep(A), A.dense()
    V = torch.randn(2, 2, tokens, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(kept.matmat(V), D @ V)
    assert_close(kept.rmatmat(V), D.mT @ V)
    assert sum(slab.weights[0, 0].numel() * 8 for slab in kept.slabs) == kept_bytes(A)


def test_a_long_causal_map_takes_little_more_than_half_the_memory():
    q, k = qk(2048, lead=(1, 1))
    assert kept_bytes(AttentionOperator(q, k, mask=Causal())) < 0.75 * kept_bytes(AttentionOperator(q, k))


def test_scores_far_below_the_maximum_are_zero_and_not_denormal():
    q, k = qk(600, lead=(1, 1), spread=60.0)
    A = AttentionOperator(q, k)
    for slab in keep(A).slabs:
        assert not bool(((slab.weights > 0) & (slab.weights < torch.finfo(torch.float32).tiny)).any())
        assert_close(slab.weights, A.rows(slab.queries), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("tokens", [60, 530])
def test_the_null_permutes_the_visible_entries_of_every_row(mask, tokens):
    q, k = qk(tokens, lead=(2, 2))
    A = AttentionOperator(q, k, mask=mask(tokens))
    kept = keep(A)
    null = permuted(kept, A.mask, seed=0)
    if null is None:
        assert tokens == 530
        return
    eye = torch.eye(tokens).expand(2, 2, -1, -1)
    before, after = kept.matmat(eye), null.matmat(eye)
    seen = visible(A.mask, A.shape).expand(A.shape)
    assert bool((after[~seen] == 0).all())
    assert torch.equal(before.sort(-1).values, after.sort(-1).values)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(200)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_the_null_of_a_long_map_has_the_edge_of_random_permutations(mask, spread):
    q, k = qk(640, lead=(1, 1), spread=spread)
    A = AttentionOperator(q, k, mask=mask)
    D, seen = A.dense().double(), visible(mask, A.shape)
    generator = torch.Generator().manual_seed(1)
    draws = [maps.attention_s2(maps.permuted_map(D, seen, generator=generator), seen) for _ in range(3)]
    found = [attention_spectra(A, seed=seed).null_s2.double() for seed in range(3)]
    spread_of_draws = torch.stack(draws).std() + torch.stack(found).std()
    difference = (torch.stack(found).mean() - torch.stack(draws).mean()).abs()
    assert float(difference) <= 0.03 * float(torch.stack(draws).mean()) + 2 * float(spread_of_draws)


def test_the_null_can_be_left_out_and_nothing_else_changes():
    A = AttentionOperator(*qk(100))
    whole, less = attention_spectra(A), attention_spectra(A, null=False)
    assert bool(less.null_s2.isnan().all())
    assert not bool(whole.null_s2.isnan().any())
    assert torch.equal(whole.s, less.s)
    assert torch.equal(whole.smoothing_gain, less.smoothing_gain)


def test_the_null_is_independent_of_maps_drawn_from_the_same_seed():
    logits = torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0))
    found = [attention_spectra(DenseAttention(logits.softmax(-1), visible=Full()), seed=s).null_s2 for s in (0, 1)]
    assert_close(found[0], found[1], rtol=0.05, atol=0)


def test_independent_rows_have_the_null_of_the_closed_form():
    logits = torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0)) * 0.5
    weights = logits.softmax(-1)
    found = attention_spectra(DenseAttention(weights, visible=Full()))
    closed = 2 * (weights.square().sum(-1).mean() - 1 / 400).sqrt()
    assert_close(found.null_s2[0, 0], closed, rtol=0.05, atol=0)
    assert_close(found.s[0, 0, 1], closed, rtol=0.05, atol=0)
