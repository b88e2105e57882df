"""Gain control against its definition on dense maps."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from attention_only import AttentionOnly, residual

import fullrank
from fullrank.edit import Call, Place
from fullrank.errors import RemedyError
from fullrank.remedies.attention.gain_control import less_mean_of_outputs


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("remedy", ["gain-control", "gain-control?factor=2&learn=true"])
def test_outputs_are_centred_over_what_each_token_sees(remedy, mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, remedy) as (_, calls):
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_gain_control_after")]
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(modules)
        for call, module in zip(seen, modules, strict=True):
            gain = 1 if module.gain is None else module.gain.detach()[:, None, None]
            heads = call.A @ call.v
            expected = gain * (heads - call.U @ heads)
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


def test_full_attention_hands_nothing_to_all_tokens_alike():
    case = MASKS["full"]()
    with repaired_and_seen(case, "gain-control") as (_, calls):
        for call in calls():
            assert call.output.mean(-2).abs().max() < 1e-12 < call.output.abs().max()


@pytest.mark.parametrize("mask", ["full", "causal", "padded"])
def test_a_measured_gain_restores_energy_in_every_head_and_layer(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "gain-control?gain=energy") as (_, calls):
        for call in calls():
            rows = real_rows(case, call).expand(call.output.shape[:3])
            found, expected = ((X.square().sum(-1) * rows).sum((0, 2)) for X in (call.output, call.A @ call.v))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_no_later_token_is_seen_where_attention_is_causal():
    case = MASKS["causal"]()
    with fullrank.repair(case.model, "gain-control", batch=case.batch), torch.no_grad():
        before = case()
        case.batch["input_ids"] = case.batch["input_ids"].clone()
        case.batch["input_ids"][:, 5:] = (case.batch["input_ids"][:, 5:] + 1) % 50
        torch.testing.assert_close(case()[:, :5], before[:, :5], rtol=0, atol=1e-12)


def test_a_cache_hides_outputs_that_are_needed_and_is_refused():
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 7, 4)
    place = Place("decoder", 1, "self", "layers.0.attention")
    call = Call(place=place, kernel="scaled_dot_product_attention", query=q, key=k, value=k)
    with pytest.raises(RemedyError, match=r"1 queries for 7 keys; run without a key-value cache"):
        less_mean_of_outputs(call, q)


def test_attention_alone_collapses_and_with_controlled_gain_does_not():
    model = AttentionOnly(tokens=64, width=128, heads=4, layers=8, drawn=1.0, seed=0)
    assert residual(model.states()[-1]) < 1e-4
    with fullrank.repair(model, "gain-control?gain=values", batch={"X": model.start}):
        last = model.states()[-1]
        assert residual(last) > 0.95
        assert 0.3 < float(last.square().mean().sqrt()) < 3
