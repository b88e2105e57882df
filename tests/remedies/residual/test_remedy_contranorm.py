"""ContraNorm against its definition on dense maps, and what it does to deep models."""

import copy

import pytest
import torch
from attending import MASKS, dense_softmax, repaired_and_seen
from schemes import deep, repaired_states, residual, states, variance

import fullrank
from fullrank.capture import survey, undisturbed
from fullrank.edit import rewrite_block
from fullrank.errors import FullrankError


def dense(Y, visible, s):
    """Y − s·softmax(ŶŶᵀ)Y over what is visible, and oneself."""
    unit = Y / Y.norm(dim=-1, keepdim=True)
    visible = visible | torch.eye(Y.shape[1], dtype=torch.bool)
    scores = (unit @ unit.mT).masked_fill(~visible, float("-inf"))
    return Y - s * dense_softmax(scores) @ Y


@pytest.mark.parametrize("mask", MASKS)
def test_every_block_hands_on_what_the_definition_says(mask):
    case = MASKS[mask]()
    twin = copy.deepcopy(case.model)
    with repaired_and_seen(case, "contranorm", scale=0.4) as (_, calls):
        seen = {(c.stack, c.layer): c.visible[:, 0] for c in calls() if c.part == "self"}
        with torch.no_grad():
            found = case()
    with undisturbed(twin), torch.no_grad():
        anatomy = survey(twin, lambda: case.answer(twin))
        plain = case.answer(twin)
        for stack in anatomy.stacks:
            for layer in range(1, len(stack.paths) + 1):

                def after(X, Y, visible=seen[stack.name, layer]):
                    return dense(Y, visible, 0.4)

                rewrite_block(twin, anatomy, after, stack=stack.name, layer=layer)
        expected = case.answer(twin)
    in_float32 = type(twin).__name__ in ("LlamaModel", "MistralModel", "T5Model")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if in_float32 else 1e-9)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_padding_has_no_part_in_it():
    case = MASKS["padded"]()
    real = case.batch["attention_mask"].bool()
    with torch.no_grad(), fullrank.repair(case.model, "contranorm", batch=case.batch):
        found = case()
        case.batch["input_ids"] = torch.where(real, case.batch["input_ids"], 7)
        torch.testing.assert_close(case()[real], found[real], rtol=0, atol=1e-12)


def test_causal_models_do_not_look_ahead():
    case = MASKS["causal"]()
    with torch.no_grad(), fullrank.repair(case.model, "contranorm", batch=case.batch):
        found = case()
        case.batch["input_ids"] = case.batch["input_ids"].clone()
        case.batch["input_ids"][:, -1] = 3
        torch.testing.assert_close(case()[:, :-1], found[:, :-1], rtol=0, atol=1e-6)


def test_states_of_earlier_tokens_that_a_cache_keeps_back_are_missed():
    case = MASKS["causal"]()
    case.batch["use_cache"] = True
    ids = case.batch["input_ids"]
    with torch.no_grad(), fullrank.repair(case.model, "contranorm", batch=case.batch):
        cache = case.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(FullrankError, match="does not go with caches"):
            case.model(input_ids=ids[:, -1:], past_key_values=cache)


@pytest.mark.slow
def test_it_is_one_graph_for_a_compiler():
    case = MASKS["padded"]()
    torch._dynamo.reset()
    with torch.no_grad(), fullrank.repair(case.model, "contranorm", batch=case.batch):
        compiled = torch.compile(case.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**case.batch)[0], case(), rtol=0, atol=1e-10)
    torch._dynamo.reset()


def test_it_is_no_attention_of_the_model():
    model, X = deep(2, width=32)
    batch = {"inputs_embeds": X}
    plain = fullrank.examine(model, batch, spectrum=False).rows.where(metric="entropy")
    with fullrank.repair(model, "contranorm", batch=batch):
        found = fullrank.examine(model, batch, spectrum=False).rows.where(metric="entropy")
    assert [(r.layer, r.part, r.head) for r in found] == [(r.layer, r.part, r.head) for r in plain]


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_deep_models_keep_tokens_apart(placement):
    model, X = deep(placement=placement)
    plain, found = states(model, X)[-1], repaired_states(model, X, "contranorm?scale=0.5")[-1]
    assert residual(plain) < 0.45
    assert residual(found) > 0.95
    assert 0.1 < variance(found) < 10


def test_remedies_of_branches_go_before_it():
    model, X = deep(2, width=32)
    batch = {"inputs_embeds": X}
    with torch.no_grad(), fullrank.repair(model, ["batch-norm", "residual-scale", "contranorm"], batch=batch):
        assert bool(torch.isfinite(model(**batch).logits).all())
    with pytest.raises(FullrankError, match="was not followed"):
        fullrank.repair(model, ["contranorm", "residual-scale"], batch=batch)
