"""AttnScale against its definition on dense maps."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance


@pytest.mark.parametrize("mask", MASKS)
def test_the_part_beyond_the_visible_mean_is_scaled(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "attn-scale") as (_, calls):
        modules = {n: m for n, m in case.model.named_modules() if n.endswith("fullrank_attn_scale_after")}
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(modules)
        for call, module in zip(seen, modules.values(), strict=True):
            omega = module.omega.detach()[:, None, None]
            expected = (call.U + (1 + omega) * (call.A - call.U)) @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))
