"""A V, Aᵀ u, U and A − U of a map that is never stored equal those of the stored one."""

import pytest
import torch

from fullrank.errors import ShapeError
from fullrank.operators import AttentionMap, AttentionOperator, Causal, DenseAttention, Full, Scores, blocks
from operators.cases import MASKS, SQUARE, mask_cases
from oracles import attention as oracle


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=1e-4)


def example(name, *, shape=(2, 4, 21, 21), key_heads=2, dtype=torch.float32, **options):
    mask, visible = mask_cases(*shape)[name]
    batch, heads, queries, keys = shape
    query, key = draw(batch, heads, queries, 8, dtype=dtype), draw(batch, key_heads, keys, 8, seed=1, dtype=dtype)
    S = oracle.scores(query, key, bias=options.get("bias"), softcap=options.get("softcap"))
    return AttentionOperator(query, key, mask=mask, **options), oracle.attention(S, visible, options.get("sink"))


@pytest.mark.parametrize("columns", [1, 8, 11, 40, 600])
@pytest.mark.parametrize("name", ["full", "causal", "causal&padding", "padding-per-head", "window", "arbitrary"])
def test_products_equal_those_of_the_stored_map_for_thin_and_wide_blocks(name, columns):
    operator, A = example(name)
    V, u = draw(2, 4, 21, columns, seed=2), draw(2, 4, 21, columns, seed=3)
    close(operator.matmat(V), A @ V.double())
    close(operator.rmatmat(u), A.mT @ u.double())
    operator.summary()  # from here on the transposed product may go through the fused kernel
    close(operator.rmatmat(u), A.mT @ u.double())


@pytest.mark.parametrize("name", MASKS)
def test_products_equal_those_of_the_stored_map_under_every_mask(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        operator, A = example(name, dtype=dtype)
        V, u = draw(2, 4, 21, 8, seed=2), draw(2, 4, 21, 8, seed=3)
        operator.summary()
        close(operator.matmat(V), A @ V.double())
        close(operator.rmatmat(u), A.mT @ u.double())
        close(operator.dense(), A)
        close(operator.rows(slice(3, 9)), A[:, :, 3:9])


@pytest.mark.parametrize("shape", [(1, 4, 5, 30), (1, 4, 30, 5), (2, 4, 1, 9), (1, 4, 9, 1)])
@pytest.mark.parametrize("name", [name for name in MASKS if name not in SQUARE])
def test_products_of_maps_that_are_not_square(name, shape):
    operator, A = example(name, shape=shape)
    V, u = draw(shape[0], 4, shape[3], 3), draw(shape[0], 4, shape[2], 3, seed=3)
    close(operator.matmat(V), A @ V.double())
    close(operator.rmatmat(u), A.mT @ u.double())
    operator.summary()
    close(operator.rmatmat(u), A.mT @ u.double())


@pytest.mark.parametrize("name", ["full", "causal&padding", "window"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("value_heads", [1, 2, 4])
@pytest.mark.parametrize("entries", [blocks.BLOCK, 300])
def test_values_may_have_heads_or_key_value_heads(name, key_heads, value_heads, entries, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", entries)
    operator, A = example(name, key_heads=key_heads)
    V = draw(2, value_heads, 21, 8, seed=2)
    expanded = V.double().repeat_interleave(4 // value_heads, 1)
    close(operator.matmat(V), A @ expanded)
    close(DenseAttention(operator.dense()).matmat(V), A @ expanded)
    close(operator.uniform().matmat(V), operator.uniform().dense().double() @ expanded)


@pytest.mark.parametrize(
    "options",
    [
        {"sink": torch.tensor([0.0, 3.0, -2.0, 40.0])},
        {"softcap": 1.5},
        {"bias": draw(4, 21, 21, seed=7)},
        {"bias": draw(4, 21, 21, seed=7), "softcap": 3.0, "sink": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    ],
    ids=["sink", "softcap", "bias", "all"],
)
@pytest.mark.parametrize("name", ["full", "causal&padding", "arbitrary"])
def test_products_of_scores_with_more_than_a_mask(name, options):
    operator, A = example(name, **options)
    V, u = draw(2, 2, 21, 8, seed=2), draw(2, 4, 21, 8, seed=3)
    close(operator.matmat(V), A @ V.double().repeat_interleave(2, 1))
    operator.summary()
    close(operator.rmatmat(u), A.mT @ u.double())
    close(operator.dense(), A)
    U = operator.uniform()
    close(U.dense().sum(-1), A.sum(-1))


@pytest.mark.parametrize("name", MASKS)
def test_the_uniform_map_averages_what_is_visible(name):
    shape = (2, 4, 21, 21)
    operator, A = example(name)
    _, visible = mask_cases(*shape)[name]
    expected = visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)
    U = operator.uniform()
    V, u = draw(2, 4, 21, 5, seed=2), draw(2, 4, 21, 5, seed=3)
    close(U.dense(), expected)
    close(U.rows(slice(2, 5)), expected[:, :, 2:5])
    close(U.matmat(V), expected @ V.double())
    close(U.rmatmat(u), expected.mT @ u.double())
    difference = operator - U
    assert difference.shape == shape
    close(difference.dense(), A - expected)
    close(difference.matmat(V), (A - expected) @ V.double())
    close(difference.rmatmat(u), (A - expected).mT @ u.double())
    close(difference.select(slice(1, 2), slice(2, 4)).dense(), (A - expected)[1:2, 2:4])
    close((U - U).dense(), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", MASKS)
def test_selecting_heads_selects_the_map(name):
    operator, A = example(name)
    u = draw(1, 2, 21, 3, seed=3)
    for heads in (slice(0, 2), slice(1, 3), slice(2, 4)):
        for known in (False, True):
            if known:
                operator.summary()
            part = operator.select(slice(1, 2), heads)
            close(part.dense(), A[1:2, heads])
            close(part.rmatmat(u), A[1:2, heads].mT @ u.double())
            close(part.summary().column_mean[0].nan_to_num(), _column_mean(A[1:2, heads]))


def _column_mean(A):
    seen = (A.sum(-1) > 0).sum(-1).clamp(min=1)
    return A.sum(2) / seen[..., None]


@pytest.mark.parametrize("name", MASKS)
def test_keys_taken_out_leave_the_rest_renormalised(name):
    operator, A = example(name)
    hidden = torch.zeros(2, 4, 21, dtype=torch.bool)
    hidden[0, 0, 0] = hidden[1, 2, 3] = hidden[1, 3, :15] = True
    rest = A * ~hidden[:, :, None]
    total = rest.sum(-1, keepdim=True)
    expected = torch.where(total > 0, rest / total, 0)
    for attention in (operator, DenseAttention(operator.dense(), visible=operator.mask)):
        found = attention.without_keys(hidden)
        close(found.dense(), expected)
        assert torch.equal(found.summary().entropy.isnan(), total[..., 0] == 0)


def test_keys_taken_out_beside_a_sink_leave_the_sink_in_its_place():
    sink = torch.tensor([0.0, 3.0, -2.0, 1.0])
    operator, A = example("causal", sink=sink)
    hidden = torch.zeros(2, 4, 21, dtype=torch.bool)
    hidden[..., :4] = True
    stored = DenseAttention(A, visible=operator.mask, sink=1 - A.sum(-1))
    close(operator.without_keys(hidden).dense()[:, :, 4:], stored.without_keys(hidden).dense()[:, :, 4:])


def test_uniform_attention_forgets_all_but_the_mean():
    A = AttentionOperator(torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), scale=1.0, mask=Full())
    V = draw(1, 6, 3)
    torch.testing.assert_close(A.matmat(V), V.mean(1, keepdim=True).expand_as(V))


def test_uniform_causal_attention_is_the_running_mean():
    A = AttentionOperator(torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), mask=Causal())
    V = draw(1, 6, 3)
    torch.testing.assert_close(A.matmat(V), V.cumsum(1) / torch.arange(1, 7)[:, None])
    torch.testing.assert_close((A - A.uniform()).matmat(V), torch.zeros_like(V), atol=1e-6, rtol=0)


def test_half_precision_inputs_are_summed_in_single_precision():
    operator, _ = example("causal", dtype=torch.bfloat16)
    assert operator.dtype == torch.float32
    assert operator.matmat(draw(2, 4, 21, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert example("causal", dtype=torch.float64)[0].matmat(draw(2, 4, 21, 8)).dtype == torch.float64


@pytest.mark.parametrize("name", ["full", "window"])
def test_products_are_measured_not_differentiated(name):
    operator, _ = example(name)
    query = operator.scores.query.clone().requires_grad_()
    A = AttentionOperator(query, operator.scores.key, mask=operator.mask)
    A.summary()
    V = draw(2, 4, 21, 8).requires_grad_()
    assert not A.matmat(V).requires_grad
    assert not A.rmatmat(V).requires_grad
    assert query.grad is None


def test_all_maps_keep_the_protocol():
    operator, _ = example("causal")
    for attention in (operator, DenseAttention(operator.dense()), operator.without_keys(torch.zeros(2, 4, 21).bool())):
        assert isinstance(attention, AttentionMap)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Scores(torch.zeros(2, 3, 4, 8), torch.zeros(2, 2, 4, 8)),
        lambda: Scores(torch.zeros(2, 4, 4, 8), torch.zeros(2, 2, 4, 7)),
        lambda: Scores(torch.zeros(2, 4, 4, 8), torch.zeros(3, 2, 4, 8)),
        lambda: Scores(torch.zeros(4, 8), torch.zeros(4, 8)),
        lambda: Scores(torch.zeros(2, 4, 4, 8), torch.zeros(2, 2, 4, 8), sink=torch.zeros(3)),
        lambda: AttentionOperator(torch.zeros(2, 4, 4, 8)),
        lambda: example("causal")[0].matmat(torch.zeros(2, 3, 21, 4)),
        lambda: example("causal")[0].matmat(torch.zeros(2, 4, 20, 4)),
        lambda: example("causal")[0].rmatmat(torch.zeros(1, 4, 21, 4)),
        lambda: example("causal")[0].uniform().matmat(torch.zeros(2, 4, 20, 4)),
        lambda: DenseAttention(torch.zeros(4, 5)),
        lambda: DenseAttention(torch.zeros(1, 1, 4, 5), logits=torch.zeros(1, 1, 4, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_sentence(ask):
    with pytest.raises(ShapeError):
        ask()
