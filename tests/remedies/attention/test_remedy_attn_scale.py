"""AttnScale against its definition on dense maps, and what it is for."""

import math

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from attention_only import AttentionOnly, residual

import fullrank
from fullrank import metrics
from golden import assert_golden


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


def test_attention_alone_collapses_and_with_a_gain_keeps_tokens_apart_in_most_draws():
    """A ← J + 5(A − J): medians, for about two draws in ten collapse all the same."""
    kept, plain = [], []
    for norm in ("none", "pre"):
        found = []
        for seed in range(10):
            model = AttentionOnly(tokens=64, width=128, heads=4, layers=12, seed=seed, norm=norm)
            plain.append(residual(model.states()[-1]))
            with fullrank.repair(model, "attn-scale?start=4", batch={"X": model.start}):
                found.append(residual(model.states()[-1]))
        kept.append(torch.tensor(found).median())
    assert max(plain) < 0.05
    assert_golden("of-attnscale-median", kept)


def test_the_published_bound_never_certifies_that_attention_smooths():
    """√(n e^{2a}/(e^{2a} + n − 1)) is at least 1 at any logits; what attention does is far below it."""
    bounds = []
    for std in (0.1, 0.5, 1.0, 2.0, 4.0):
        drawn = []
        for seed in range(20):
            P = std * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            e = math.exp(2 * float(P.abs().max()))
            bound = math.sqrt(64 * e / (e + 63))
            assert float(metrics.smoothing_gain(P.softmax(-1))) < bound
            assert bound > 1
            drawn.append(bound)
        bounds.append(sum(drawn) / 20)
    assert_golden("of-wang-bound", bounds)
