"""Every metric of an attention map equals its definition written with loops: all masks, some queries, any row sum."""

import inspect

import pytest
import torch

import fullrank.metrics as metrics
from fullrank.errors import BatchError
from fullrank.metrics.attention import shown
from fullrank.metrics.rows import selectivity_from_summary
from oracles import maps, states

OF_A = (
    "entropy",
    "normalized_entropy",
    "effective_keys",
    "inverse_participation",
    "selectivity",
    "sink_mass",
    "sink_position",
    "attention_s1",
    "attention_s2",
    "outlier_share",
    "attention_stable_rank",
    "uniform_distance",
    "smoothing_gain",
)
OF_VALUES = ("branch_energy", "contrast_gain")
OF_S = ("logit_std", "log_context_gauge", "max_logit")


def visibility(kind, T, S, generator):
    match kind:
        case "full":
            return None
        case "causal":
            return torch.ones(T, S, dtype=torch.bool).tril()
        case "window":
            return torch.ones(T, S, dtype=torch.bool).tril().triu(-2)
        case "blind":  # one query that sees nothing, one key that nobody sees
            visible = torch.ones(T, S, dtype=torch.bool).tril()
            visible[3] = False
            visible[:, 2] = False
            return visible
        case _:
            return torch.rand(2, 1, T, S, generator=generator) > 0.4


KINDS = ("full", "causal", "window", "blind", "arbitrary")


def attention(kind, generator, *, T=8, S=8, heads=3, dtype=torch.float64, sharpness=1.5):
    logits = sharpness * torch.randn(2, heads, T, S, generator=generator, dtype=torch.float64)
    visible = visibility(kind, T, S, generator)
    A = (logits if visible is None else logits.masked_fill(~visible, -1e30)).softmax(-1)
    return A.to(dtype), logits.to(dtype), visible


def loops(name, A, visible, rows, *extra):
    of = getattr(maps, name)
    seen = torch.ones(A.shape, dtype=torch.bool) if visible is None else visible.expand(A.shape)
    counted = torch.ones(A.shape[:-1], dtype=torch.bool) if rows is None else rows.expand(A.shape[:-1])
    found = torch.empty(A.shape[:2], dtype=torch.float64)
    for b in range(A.shape[0]):
        for h in range(A.shape[1]):
            queries = counted[b, h].nonzero()[:, 0].tolist()
            found[b, h] = of(A[b, h].double(), *(v[b, h].double() for v in extra), seen[b, h], queries)
    return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_A)
def test_a_metric_of_the_map_equals_its_definition(name, kind, late, generator):
    A, _, visible = attention(kind, generator)
    rows = torch.arange(8) >= 4 if late else None
    found = getattr(metrics, name)(A, visible, rows)
    torch.testing.assert_close(found.double(), loops(name, A, visible, rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_S)
def test_a_metric_of_the_logits_equals_its_definition(name, kind, late, generator):
    _, S, visible = attention(kind, generator)
    rows = (torch.arange(8) >= 4).expand(2, 1, 8) if late else None
    found = getattr(metrics, name)(S, visible, rows)
    torch.testing.assert_close(found, loops(name, S, visible, rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["branch_energy", "contrast_gain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_of_the_map_and_its_values_equals_its_definition(name, kind, generator):
    A, _, visible = attention(kind, generator)
    V = torch.randn(2, 3, 8, 5, generator=generator, dtype=torch.float64) + 0.3
    for rows in (None, torch.arange(8) >= 4):
        found = getattr(metrics, name)(A, V, visible, rows)
        torch.testing.assert_close(found, loops(name, A, visible, rows, V))
    shared = getattr(metrics, name)(A, V[:, :1], visible)
    torch.testing.assert_close(shared, getattr(metrics, name)(A, V[:, :1].expand_as(V), visible))


@pytest.mark.parametrize("name", OF_A)
def test_rectangular_maps_and_low_precision_are_measured_in_float32_at_least(name, generator):
    A, _, _ = attention("full", generator, T=5, S=9, dtype=torch.bfloat16)
    found = getattr(metrics, name)(A)
    torch.testing.assert_close(found.double(), loops(name, A, None, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["selectivity", "uniform_distance", "branch_energy", "contrast_gain"])
def test_rows_from_which_a_learned_sink_took_a_part_keep_the_definition(name, kind, generator):
    A, _, visible = attention(kind, generator)
    A = A * torch.rand(2, 3, 8, 1, generator=generator, dtype=torch.float64)
    V = (torch.randn(2, 3, 8, 5, generator=generator, dtype=torch.float64),) if name in OF_VALUES else ()
    found = getattr(metrics, name)(A, *V, visible)
    torch.testing.assert_close(found, loops(name, A, visible, None, *V), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_selectivity_follows_from_row_entropies_and_column_mass(kind, generator):
    """The identity by which the streaming summary gives it without a second pass over A."""
    A, _, visible = attention(kind, generator)
    rows = torch.arange(8) >= 4
    c = metrics.column_mean(A, visible, rows)
    seen = torch.ones(8, 8, dtype=torch.bool) if visible is None else visible
    H = torch.where(seen.any(-1), -torch.xlogy(A, A).sum(-1), torch.nan)
    Z = (seen * c[..., None, :]).sum(-1)
    torch.testing.assert_close(selectivity_from_summary(H, c, Z, rows), metrics.selectivity(A, visible, rows))


@pytest.mark.parametrize("name", [*OF_A, *OF_S])
def test_no_query_left_gives_nan_and_no_exception(name, generator):
    A, _, _ = attention("full", generator)
    found = getattr(metrics, name)(A, torch.zeros(8, 8, dtype=torch.bool))
    if name != "sink_position":
        assert bool(found.isnan().all())
    nobody = getattr(metrics, name)(A, None, torch.zeros(8, dtype=torch.bool))
    assert nobody.shape == (2, 3)


def test_a_visibility_that_does_not_fit_is_answered_in_one_sentence():
    unchecked = inspect.unwrap(shown)  # without the shape checker of the tests, as users have it
    with pytest.raises(BatchError, match=r"visible has shape \(3, 3\); it must broadcast to \(2, 4, 4\)"):
        unchecked(torch.zeros(2, 4, 4), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_shuffling_keeps_every_row_s_entries_and_its_mask(kind, generator):
    A, _, visible = attention(kind, generator)
    shuffled = metrics.permuted_map(A, visible, generator=generator)
    kept = A if visible is None else torch.where(visible, A, 0)
    torch.testing.assert_close(shuffled.sort(-1).values, kept.sort(-1).values)
    if visible is not None:
        assert bool((shuffled[~visible.expand(A.shape)] == 0).all())
    assert not torch.equal(shuffled, kept)


def test_bulk_excess_is_near_one_for_independent_rows_and_above_it_for_structure(generator):
    independent = (torch.randn(64, 64, generator=generator) * 1.5).softmax(-1)
    assert metrics.bulk_excess(independent) == pytest.approx(1, abs=0.15)
    position = torch.arange(64.0)
    local = (-(position[:, None] - position).abs() / 6).softmax(-1)
    assert metrics.bulk_excess(local) > 1.2
    assert metrics.bulk_excess(local, seed=1) != metrics.bulk_excess(local, seed=2)
    assert metrics.bulk_excess(local, seed=1) == metrics.bulk_excess(local, seed=1)


def test_head_similarity_equals_its_definition(generator):
    contributions = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64) + 0.2
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    expected = [states.head_similarity(c[:, m]) for c, m in zip(contributions, mask, strict=True)]
    found = metrics.head_similarity(contributions, mask)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert metrics.head_similarity(contributions[:, :1]).isnan().all()


def test_the_nearest_head_is_the_one_of_the_largest_cosine(generator):
    contributions = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64) + 0.2
    contributions[1, 3] = -2 * contributions[1, 0]
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    expected = [states.nearest_head(c[:, m]) for c, m in zip(contributions, mask, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(metrics.nearest_head_similarity(contributions, mask), expected[..., 0])
    torch.testing.assert_close(metrics.nearest_head(contributions, mask), expected[..., 1])


def test_a_head_that_writes_nothing_has_no_nearest_and_is_nobodys(generator):
    contributions = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    contributions[1] = 0
    for metric in (metrics.nearest_head_similarity, metrics.nearest_head):
        assert metric(contributions).isnan().tolist() == [False, True, False]
        assert metric(contributions[:1]).isnan().all()
    assert metrics.nearest_head(contributions)[0] == 2


def test_heads_that_write_into_different_directions_are_unambiguous(generator):
    W = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    found = metrics.head_ambiguity(W, heads=3, tokens=7)
    assert found.degrees_of_freedom == 0
    assert float(found.condition_number) == pytest.approx(1, abs=1e-5)
    apart = found.principal_angles[0, 1]
    torch.testing.assert_close(apart, torch.full_like(apart, torch.pi / 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.principal_angles[1, 1], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-3)


def test_heads_that_share_directions_are_ambiguous(generator):
    block = torch.randn(4, 12, generator=generator)
    found = metrics.head_ambiguity(torch.cat([block, block]), heads=2, tokens=5)
    assert found.degrees_of_freedom == 5 * 4
    assert found.condition_number > 1e6
    assert float(found.principal_angles[0, 1].max()) < 1e-3
    with pytest.raises(BatchError, match="heads=3 does not divide the 8 rows"):
        metrics.head_ambiguity(torch.zeros(8, 8), heads=3, tokens=1)


@pytest.mark.parametrize("width", [2, 3, 6])
def test_a_key_is_unselectable_iff_it_is_a_mixture_of_the_others(width, generator):
    K = torch.randn(2, 14, width, generator=generator, dtype=torch.float64)
    K[0, 3] = (K[0, 0] + K[0, 1]) / 2
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    expected = []
    for keys, real in zip(K, mask, strict=True):
        cloud = keys[real]
        expected.append(sum(states.in_hull(cloud, i) for i in range(len(cloud))) / len(cloud))
    found = metrics.unselectable_keys(K, mask)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_equal_keys_cannot_be_told_apart_by_any_query():
    assert metrics.unselectable_keys(torch.ones(4, 3)) == 1
    assert metrics.unselectable_keys(torch.ones(1, 3)).isnan()


def test_a_single_query_or_key_has_no_second_singular_value_and_no_queries_have_no_maximum():
    assert metrics.attention_s2(torch.ones(1, 1)).isnan()
    assert metrics.attention_s2(torch.full((1, 4), 0.25)).isnan()
    assert metrics.max_logit(torch.ones(0, 4)).isnan()


@pytest.mark.parametrize("shape", [(12, 12), (12, 7), (8, 12)])
def test_rank_and_condition_number_are_those_of_the_singular_values(shape, generator):
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    sigma = torch.linalg.svd(W).S
    ratio = float(sigma[0] / sigma[-1]) if shape[0] <= shape[1] else float("inf")
    assert float(metrics.conditioning(W).condition_number) == pytest.approx(ratio, rel=1e-9)
    W[3] = W[1]
    found = metrics.conditioning(W)
    assert int(found.rank) == int(torch.linalg.matrix_rank(W)) == min(shape[0] - 1, shape[1])
    assert float(found.condition_number) > 1e12
    B = torch.randn(shape[1], 3, generator=generator, dtype=torch.float64)
    assert int(metrics.conditioning(W, readout=B).rank) == 3
    assert int(metrics.conditioning(W, tau=1.1).rank) == 0
    both = metrics.head_ambiguity(W, heads=2, tokens=5)
    assert both.degrees_of_freedom == 5 * (shape[0] - found.rank)
    assert torch.equal(both.condition_number, found.condition_number)
