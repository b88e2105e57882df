"""A map that a model already made gives the same numbers as one that is never stored."""

import pytest
import torch

from fullrank.operators import AttentionOperator, Causal, DenseAttention, Full, Padding
from operators.cases import MASKS, mask_cases
from oracles import attention as oracle

ROWS = ("entropy", "inverse_participation", "row_sum", "log_sum_exp", "max_logit", "logit_mean", "logit_std")


def example(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 21, 8, generator=generator) for _ in range(2))
    mask, visible = mask_cases(2, 4, 21, 21)[name]
    S = oracle.scores(query, key)
    lowest = torch.finfo(dtype).min
    logits = S.to(dtype).masked_fill(~visible, lowest)
    return query, key, mask, visible, S, oracle.attention(S, visible).to(dtype), logits


@pytest.mark.parametrize("name", MASKS)
def test_the_summary_of_a_stored_map_equals_the_definition(name):
    _, _, mask, visible, S, A, logits = example(name, torch.float64)
    expected = oracle.row_statistics(S, A, visible)
    groups = torch.rand(2, 2, 21, generator=torch.Generator().manual_seed(1)) < 0.5
    for given in (visible, mask, None):
        attention = DenseAttention(A, logits=logits, visible=given)
        summary = attention.summary(groups=groups)
        for row in ROWS:
            torch.testing.assert_close(getattr(summary, row), expected[row], equal_nan=True, msg=row)
        assert torch.equal(summary.visible, visible.sum(-1))
        means = torch.stack([oracle.column_mean(A, visible, rows) for rows in groups])
        torch.testing.assert_close(summary.column_mean, means, equal_nan=True)
        mass = attention.visible_mass(summary.column_mean.nan_to_num())
        torch.testing.assert_close(mass, (means.nan_to_num()[:, :, :, None] * visible).sum(-1))


@pytest.mark.parametrize("name", MASKS)
def test_a_stored_and_a_streamed_map_agree(name):
    query, key, mask, _, _, A, logits = example(name)
    streamed, stored = AttentionOperator(query, key, mask=mask), DenseAttention(A, logits=logits)
    one, other = streamed.summary(), stored.summary()
    for row in (*ROWS, "column_mean"):
        torch.testing.assert_close(getattr(one, row), getattr(other, row), atol=1e-5, rtol=1e-4, equal_nan=True)
    V = torch.randn(2, 4, 21, 3, generator=torch.Generator().manual_seed(3))
    for left, right in ((streamed, stored), (streamed - streamed.uniform(), stored - stored.uniform())):
        torch.testing.assert_close(left.matmat(V), right.matmat(V), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(left.rmatmat(V), right.rmatmat(V), atol=2e-5, rtol=1e-4)
        part = slice(1, 2), slice(1, 3)
        torch.testing.assert_close(left.select(*part).dense(), right.select(*part).dense(), atol=1e-5, rtol=1e-4)


def test_without_logits_their_statistics_are_unknown():
    A = example("causal")[5]
    summary = DenseAttention(A).summary()
    for name in ("log_sum_exp", "max_logit", "logit_mean", "logit_std"):
        assert getattr(summary, name).isnan().all()
    assert not summary.entropy.isnan().any()


def test_visibility_is_inferred_from_logits_before_weights():
    logits = torch.tensor([[[[0.0, 0.0, -200.0], [0.0, torch.finfo(torch.float32).min, 0.0]]]])
    weights = logits.softmax(-1)
    assert DenseAttention(weights, logits=logits).visible_count().tolist() == [[[3, 2]]]
    assert DenseAttention(weights).visible_count().tolist() == [[[2, 2]]]  # −200 underflowed to 0
    assert DenseAttention(weights, visible=Full()).visible_count().tolist() == [[[3, 3]]]


def test_the_mask_of_a_stored_map_is_recognised():
    _, _, _, _, _, A, _ = example("causal&padding")
    parts = DenseAttention(A).mask.parts
    assert {type(part) for part in parts} == {Causal, Padding}


def test_numbers_are_of_the_weights_as_rounded():
    """In bfloat16 a row of 1/3 sums to 1.002: entropy and row sum say so, nothing is silently renormalised."""
    A = torch.full((1, 1, 3, 3), 1 / 3).bfloat16()
    summary = DenseAttention(A).summary()
    a = float(A[0, 0, 0, 0])
    assert summary.row_sum[0, 0, 0].item() == pytest.approx(3 * a)
    assert summary.entropy[0, 0, 0].item() == pytest.approx(-3 * a * torch.log(torch.tensor(a)).item())
    assert DenseAttention(A).matmat(torch.ones(1, 1, 3, 1)).dtype == torch.float32


def test_a_row_whose_sink_column_was_dropped_keeps_its_sum():
    """GPT-OSS makes a map with one more column and drops it: U takes the row's sum, as A does."""
    sink = torch.tensor([0.0, 3.0, -2.0, 1.0])
    query, key, mask, visible, S, _, _ = example("causal")
    A = oracle.attention(S, visible, sink)
    stored, streamed = DenseAttention(A, logits=S, visible=visible), AttentionOperator(query, key, mask=mask, sink=sink)
    one, other = stored.summary(), streamed.summary()
    for row in (*ROWS, "column_mean"):
        torch.testing.assert_close(getattr(one, row), getattr(other, row), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stored.uniform().dense(), streamed.uniform().dense().double(), atol=1e-6, rtol=1e-4)


def test_a_row_of_which_nothing_is_left_counts_as_seeing_no_key():
    weights = torch.eye(3)[None, None]
    hidden = torch.tensor([[[True, False, False]]])
    rest = DenseAttention(weights, visible=Full()).without_keys(hidden)
    assert rest.dense()[0, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert rest.summary().entropy.isnan().tolist() == [[[True, False, False]]]
    assert rest.visible_count().tolist() == [[[0, 2, 2]]]


@pytest.mark.parametrize("made", ["streamed", "dense"])
def test_of_a_causal_map_the_first_tokens_are_a_map_of_their_own(made, generator):
    q, k = (torch.randn(2, 2, 11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(1, 2, 11, 11, generator=generator, dtype=torch.float64)
    whole = AttentionOperator(q, k, mask=Causal(), bias=bias, sink=torch.tensor([0.3, -1.0]))
    alone = AttentionOperator(
        q[:, :, :5], k[:, :, :5], mask=Causal(), bias=bias[..., :5, :5], sink=torch.tensor([0.3, -1.0])
    )
    if made == "dense":
        whole = DenseAttention(whole.dense(), visible=Causal())
    torch.testing.assert_close(whole.leading(5).dense(), alone.dense())
    torch.testing.assert_close(whole.leading(5).summary().entropy, alone.summary().entropy)
