"""Which tokens and rows a number is taken over."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.measure.positions import eligible_rows, late_tokens, real_or_all
from fullrank.operators import AttentionOperator, Causal, Full, Padding, SlidingWindow


def test_late_tokens_see_more_than_half_of_the_context():
    assert late_tokens(torch.ones(1, 5, dtype=torch.bool)).tolist() == [[False, False, True, True, True]]
    assert late_tokens(torch.ones(1, 4, dtype=torch.bool)).tolist() == [[False, False, True, True]]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 10))
def test_late_tokens_do_not_depend_on_the_side_of_the_padding(tokens, padding):
    right = torch.tensor([[True] * tokens + [False] * padding])
    left = torch.tensor([[False] * padding + [True] * tokens])
    assert torch.equal(late_tokens(right)[:, :tokens], late_tokens(left)[:, padding:])
    assert int(late_tokens(right).sum()) == tokens - tokens // 2


def test_rows_that_see_fewer_than_32_keys_enter_no_mean_at_long_context():
    attention = AttentionOperator(torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4), mask=Causal())
    everything = torch.ones(1, 256, dtype=torch.bool)
    rows = eligible_rows(attention.visible_count(), everything, everything)
    assert rows[0].nonzero().flatten().tolist() == list(range(31, 256))


def test_at_short_context_a_quarter_of_the_keys_is_enough():
    attention = AttentionOperator(torch.zeros(1, 1, 10, 4), torch.zeros(1, 1, 10, 4), mask=Causal())
    everything = torch.ones(1, 10, dtype=torch.bool)
    rows = eligible_rows(attention.visible_count(), everything, everything)
    assert rows[0].tolist() == [False] * 2 + [True] * 8  # ⌈10/4⌉ = 3 keys


def test_padded_queries_never_enter():
    real = torch.tensor([[True, True, True, False]])
    attention = AttentionOperator(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), mask=Full() & Padding(real))
    assert eligible_rows(attention.visible_count(), real, real).tolist() == [[True, True, True, False]]


def test_no_mask_means_every_token_is_real():
    assert real_or_all(None, 2, 3, torch.device("cpu")).tolist() == [[True] * 3] * 2


def test_a_short_window_is_no_reason_to_leave_every_row_out():
    attention = AttentionOperator(torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4), mask=SlidingWindow(8))
    everything = torch.ones(1, 256, dtype=torch.bool)
    rows = eligible_rows(attention.visible_count(), everything, everything)
    assert rows[0].nonzero().flatten().tolist() == list(range(1, 256))  # ⌈8/4⌉ = 2 keys
