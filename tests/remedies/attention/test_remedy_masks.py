"""What the dense references take for visible is what padding, causality and windows say, told by loops."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, seen_by_hand


@pytest.mark.parametrize("mask", MASKS)
def test_calls_see_what_padding_causality_and_windows_leave(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "attn-scale", stirred=False) as (_, calls):
        seen = [call for call in calls() if call.part == "self" and (mask != "biased" or call.stack == "encoder")]
        assert len(seen) == 3
        for call in seen:
            expected = seen_by_hand(mask, case, *call.s.shape[-2:]).expand(call.visible.shape)
            rows = real_rows(case, call)
            assert torch.equal(call.visible[rows], expected[rows])
