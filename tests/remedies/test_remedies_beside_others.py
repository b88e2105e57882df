"""Remedies of attention beside others, beside caches of every kind, and under autocast."""

import kinds
import pytest
import torch
from attending import MASKS, dense_softmax, repaired_and_seen
from calls import normal, shown

import fullrank
from fullrank.errors import EditError, RemedyError
from fullrank.remedies import asked_for
from fullrank.remedies.attention.carried_scores import coefficients, steps
from fullrank.remedies.attention.scores import attended, scores
from fullrank.remedies.attention.softpick import Softpick
from fullrank.remedies.attention.visible_mean import visible_mean


def carried(call, calls):
    """softmax of the Hopfield average of all scores up to this layer's."""
    before = [one for one in calls if one.layer <= call.layer]
    counts = coefficients(steps(len(before), "average"))
    h = sum(c * one.scale * one.q @ one.k.mT for c, one in zip(counts, before, strict=True))
    return dense_softmax(h.masked_fill(~call.visible, -torch.inf))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", ["value-residual?kind=fixed", "neutreno"])
def test_scores_and_values_of_layers_before_are_carried_in_either_order(other, order):
    case = MASKS["causal"]()
    with repaired_and_seen(case, ["hopfield", other][::order], stirred=False) as (_, seen):
        calls = seen()
        for call in calls:
            A, first = carried(call, calls), calls[0].v
            mixed = call.v if call.layer == 1 else (first + call.v) / 2
            expected = A @ mixed if "residual" in other else A @ call.v + 0.6 * (first - call.v)
            torch.testing.assert_close(call.output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("other", ["softcap?cap=0.5", "learned-sink?start=0", "softpick"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("name", "mask"), [("differential", "causal"), ("deflate-attention", "full")])
def test_what_needs_the_map_of_a_softmax_is_refused_beside_what_makes_another(name, mask, order, other):
    case = MASKS[mask]()
    with torch.no_grad():
        base = case()
        with pytest.raises((RemedyError, EditError), match="needs the map of a softmax"):
            fullrank.repair(case.model, [name, other][::order], batch=case.batch)
        assert torch.equal(case(), base)


@pytest.mark.parametrize("other", ["local-mask?window=2", "hopfield", "temperature?scale=2"])
@pytest.mark.parametrize("order", [1, -1])
def test_at_temperature_one_a_difference_changes_nothing_beside_what_changes_the_call(order, other):
    case = MASKS["causal"]()
    with torch.no_grad():
        with fullrank.repair(case.model, other, batch=case.batch):
            expected = case()
        with fullrank.repair(case.model, ["differential", other][::order], batch=case.batch):
            torch.testing.assert_close(case(), expected, rtol=0, atol=1e-10)


def cached(llama, ids, mask, kind):
    """Logits or states of chunks of 5, 1, 2 and 1 tokens beside a cache."""
    from transformers import DynamicCache, StaticCache

    place = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=llama.config) if kind == "growing" else StaticCache(llama.config, max_cache_len=12)
    states = []
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 9)):
        given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        out = llama(**given, position_ids=place[:, start:stop], past_key_values=cache, use_cache=True)
        states.append(out[0])
    return torch.cat(states, 1)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize(
    "remedy", ["shaped?start=skipless", "neutreno", "local-mask?window=2&first=1", "differential?start=0.5", "softpick"]
)
def test_chunks_beside_a_cache_say_what_the_whole_text_says(remedy, kind, padding):
    llama = kinds.build("llama").model
    ids = torch.arange(1, 10).expand(2, -1).contiguous()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": place}
    with fullrank.repair(llama, remedy, batch=whole), torch.no_grad():
        expected = llama(**whole, use_cache=False)[0]
        found = cached(llama, ids, mask, kind)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


def test_under_autocast_scores_outputs_and_means_are_those_of_float32():
    q, k, v = (normal(1, 2, 9, 8, seed=seed).float() for seed in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    call, pick = shown(q, k, v, mask=mask), Softpick(1e-6)
    expected = scores(call)[0], attended(call, pick._weigh), visible_mean(call)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(call)[0], attended(call, pick._weigh), visible_mean(call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("written", "meant"), [(".5", 0.5), ("5.", 5.0), ("+2", 2.0), ("1e-1", 0.1)])
def test_numbers_may_be_written_as_in_python(written, meant):
    assert asked_for(f"temperature?scale={written}", {})[0].parameters["scale"] == meant


def test_what_is_no_number_is_refused_as_it_is_written():
    with pytest.raises(RemedyError, match=r"scale='\.5x'"):
        asked_for("temperature?scale=.5x", {})
