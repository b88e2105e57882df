"""Shaped attention against its definition on dense maps."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from attention_only import AttentionOnly, residual
from calls import normal, shown

import fullrank
from fullrank.edit import Call, Place
from fullrank.errors import EditError
from fullrank.remedies.attention.shaped import Shaped

BLOCKS = {
    "shaped": (0.0, 1.0, 0.0),
    "shaped?start=skipless": (1.0, 1.0, 1.0),
    "shaped?start=value-skipinit": (1.0, 0.0),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("remedy", BLOCKS)
def test_identity_map_and_uniform_part_are_weighted(remedy, mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, remedy) as (_, calls):
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_shaped_after")]
        seen = [call for call in calls() if call.part == "self"]
        for call, module in zip(seen, modules, strict=True):
            alpha, beta = (p.detach()[:, None, None] for p in (module.alpha, module.beta))
            gamma = 0 if module.gamma is None else module.gamma.detach()[:, None, None]
            shaped = alpha * torch.eye(call.v.shape[-2]) + beta * call.A - gamma * call.U
            expected = shaped @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize(("remedy", "start"), BLOCKS.items())
def test_strengths_start_where_the_form_says(remedy, start):
    case = MASKS["full"]()
    with fullrank.repair(case.model, remedy, batch=case.batch):
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_shaped_after")]
        for module in modules:
            found = [float(p.detach().unique()) for p in module.parameters()]
            assert found == list(start)


def test_with_queries_at_zero_skipless_attention_hands_on_the_values_alone():
    model = AttentionOnly(tokens=16, width=32, heads=4, layers=3, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.query.zero_()
            block.value.copy_(torch.eye(32))
            block.output.weight.copy_(torch.eye(32))
    with torch.no_grad():
        assert residual(model(model.start)) < 1e-6
        with fullrank.repair(model, "shaped?start=skipless", batch={"X": model.start}):
            torch.testing.assert_close(model(model.start), model.start, rtol=0, atol=1e-12)


def test_a_stack_without_skips_that_starts_at_the_identity_keeps_its_tokens_apart():
    """Twelve layers of attention alone; the map collapses, the shaped map does not."""
    model = AttentionOnly(tokens=64, width=128, heads=4, layers=12, seed=0)
    with torch.no_grad():
        assert residual(model(model.start)) < 1e-3
        for remedy in ("shaped?start=skipless", "shaped?start=value-skipinit"):
            with fullrank.repair(model, remedy, batch={"X": model.start}):
                assert residual(model(model.start)) > 0.9


def test_queries_that_continue_a_cache_are_the_last_tokens():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, t, 4, generator=generator, dtype=torch.float64) for t in (3, 7, 7))
    place = Place("decoder", 1, "self", "attention")
    shaped = Shaped(2, 1.0, 0.0, None).double()
    output = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    call = Call(place=place, kernel="scaled_dot_product_attention", query=q, key=k, value=v)
    lower = torch.ones(3, 7, dtype=torch.bool).tril(4)[None, None]
    torch.testing.assert_close(shaped(call.change(mask=lower), output).detach(), v[..., 4:, :])
    empty = lower.roll(-2, -1) & (torch.arange(7) < 5)  # a cache of fixed length, two places of which are still empty
    torch.testing.assert_close(shaped(call.change(mask=empty), output).detach(), v[..., 2:5, :])
    torch.testing.assert_close(shaped(call.change(causal=True), output).detach(), v[..., :3, :])
    single = call.change(query=q[..., :1, :])
    torch.testing.assert_close(shaped(single, output[..., :1, :]).detach(), v[..., 6:, :])


@pytest.mark.parametrize(
    "mask", [None, torch.ones(1, 1, 1, 7, dtype=torch.bool), torch.ones(1, 1, 1, 7).expand(-1, -1, 3, -1)]
)
def test_where_no_mask_tells_which_value_is_a_query_s_own_it_is_refused(mask):
    call = shown(normal(1, 2, 3, 4), normal(1, 2, 7, 4), mask=mask)
    with pytest.raises(EditError, match="3 queries for 7 keys and no mask that tells"):
        Shaped(2, 1.0, 0.0, None).double()(call, normal(1, 2, 3, 4))
