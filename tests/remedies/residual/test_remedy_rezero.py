"""ReZero: one number for each block, without norms or with them."""

import pytest
import torch
from blocks import NAMES, by_hand, close, repaired
from normed import FAMILIES, normed, without
from remedy_patients import stir
from schemes import deep, gradients, residual, states, variance

import fullrank


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norms", ["keep", "remove"])
def test_branches_of_a_block_share_one_number(name, norms):
    found, alpha = repaired(name, "rezero", norms=norms)
    assert [a.shape for a in alpha] == [(1,)] * 3
    expected = by_hand(name, lambda layer, branch, X, F: X + alpha[layer - 1] * F, normed=norms == "keep")
    close(found, expected, 1e-10 * float(expected.abs().max().clamp(min=1)))


def test_at_first_blocks_are_the_identity_and_only_the_number_has_a_gradient():
    model, X = deep(3, width=32)
    with fullrank.repair(model, "rezero", batch={"inputs_embeds": X}):
        assert all(torch.equal(one, X[0].double()) for one in states(model, X))
        model(inputs_embeds=X).logits.square().sum().backward()
        for name, p in model.blocks.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == name.endswith("alpha"), name


def test_a_shared_block_has_one_number_for_all_its_calls():
    import kinds

    kind = kinds.build("albert")
    with fullrank.repair(kind.model, "rezero", batch=kind.batch) as repair:
        assert repair.parameters == 1


def test_without_norms_the_stream_keeps_its_size_and_tokens_stay_apart_where_the_number_is_small():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    assert gradients(model, X)[1] < 0.05
    with fullrank.repair(model, "rezero?start=0.2", batch={"inputs_embeds": X}):
        last = states(model, X)[-1]
        assert residual(last) > 0.85
        assert variance(last) < 3
        assert gradients(model, X)[1] > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_norms_of_what_branches_add_are_taken_out_and_the_number_stays(family, start):
    case = normed(family)
    with torch.no_grad():
        with fullrank.repair(case.model, "rezero", start=start, batch=case.batch) as repair:
            assert repair.parameters == 3
            assert not repair.notes
            first = case()
            alpha = [p for n, p in case.model.named_parameters() if n.endswith("alpha")]
            stir(alpha)
            alpha = [p.detach().clone() for p in alpha]
            found = case()
        with without(case.model, lambda layer, branch: start):
            close(first, case())
        with without(case.model, lambda layer, branch: alpha[layer - 1]):
            close(found, case())


def test_at_first_blocks_that_normalise_what_they_add_are_the_identity():
    case = normed("olmo2")
    with torch.no_grad(), fullrank.repair(case.model, "rezero", batch=case.batch):
        close(case(), case.model.norm(case.model.embed_tokens(case.batch["input_ids"])))
