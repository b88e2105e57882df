"""A local mask against its definition, and the collapse that it slows."""

import pytest
import torch
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import normal, shown
from torch.nn import functional

from fullrank.remedies.attention.local_mask import LocalMask


def _near(T, window, side, starts, first):
    """(batch, 1, T, T); `starts` are the columns of the first real tokens."""
    return torch.tensor(
        [
            [
                [(abs(t - s) < window or start <= s < start + first) and (side == "both" or s <= t) for s in range(T)]
                for t in range(T)
            ]
            for start in starts
        ]
    )[:, None]


@pytest.mark.parametrize(("window", "side", "first"), [(None, "both", 0), (2, "past", 1), (1, "both", 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_far_is_hidden_beside_what_is_hidden(mask, window, side, first):
    case = MASKS[mask]()
    parameters = {"window": window, "side": side, "first": first}
    with repaired_and_seen(case, "local-mask", **parameters) as (_, calls):
        for call in [call for call in calls() if call.part == "self"]:
            T = call.s.shape[-1]
            padding = case.batch.get("attention_mask")
            starts = [0] * len(call.s) if padding is None else padding.argmax(1).tolist()
            near = _near(T, T // 2 if window is None else window, side, starts, first)
            s = call.s.masked_fill(~near, float("-inf"))
            rows = real_rows(case, call) & (call.visible & near).any(-1)
            assert rows.any()
            torch.testing.assert_close(
                call.output[rows], (dense_softmax(s) @ call.v)[rows], rtol=0, atol=tolerance(mask)
            )


def test_for_uniform_attention_tokens_collapse_more_slowly_the_narrower_the_window():
    """X ← AX without skips, 8 layers: what is left of the tokens' differences, as a share."""
    left = {}
    for window in (2, 4, 64):
        mask, X = LocalMask(window, 0, past=False), normal(1, 1, 64, 32)
        for _ in range(8):
            call = mask(shown(torch.zeros_like(X), torch.zeros_like(X), X))
            X = functional.scaled_dot_product_attention(call.query, call.key, call.value, call.mask)
        left[window] = float((X - X.mean(-2, keepdim=True)).norm() / X.norm())
    assert left[2] > left[4] > 0.5
    assert left[64] < 1e-12


def test_with_fewer_queries_than_keys_the_queries_are_the_last():
    near = LocalMask(2, 0, past=True).near(shown(normal(1, 1, 1, 4), normal(1, 1, 5, 4)))
    assert near.tolist() == [[[[False, False, False, True, True]]]]


def test_places_of_a_cache_that_are_still_empty_are_not_near_anything():
    sees = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)[None, None]
    call = shown(normal(1, 1, 2, 4), normal(1, 1, 6, 4), mask=sees)
    found = LocalMask(2, 0, past=False)(call).mask
    assert found.int().tolist() == [[[[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]]]


def test_the_first_are_the_first_tokens_and_no_padding():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    sees = real[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    found = LocalMask(1, 1, past=False)(shown(normal(2, 1, 6, 4), normal(2, 1, 6, 4), mask=sees)).mask[:, 0]
    assert found[0, 2:].int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]
    assert found[1, 4].int().tolist() == [1, 0, 0, 0, 1, 0]
