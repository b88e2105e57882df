"""SkipInit: one number for each branch."""

import pytest
import torch
from blocks import NAMES, by_hand, close, repaired
from normed import FAMILIES, normed, without
from remedy_patients import stir
from schemes import deep, residual, states

import fullrank

PLACE = {"attention": 0, "mlp": 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norms", ["keep", "remove"])
def test_each_branch_has_a_number(name, norms):
    found, alpha = repaired(name, "skip-init", norms=norms)
    assert [a.shape for a in alpha] == [(1,)] * 6

    def add(layer, branch, X, F):
        return X + alpha[2 * (layer - 1) + PLACE[branch]] * F

    expected = by_hand(name, add, normed=norms == "keep")
    close(found, expected, 1e-10 * float(expected.abs().max().clamp(min=1)))


def test_each_branch_of_a_decoder_with_cross_attention_has_one():
    import kinds

    kind = kinds.build("t5")
    with fullrank.repair(kind.model, "skip-init", batch=kind.batch) as repair:
        assert repair.parameters == 3 * 2 + 3 * 3


def test_at_first_blocks_do_nothing_and_small_numbers_keep_tokens_apart():
    model, X = deep(2, width=32)
    with fullrank.repair(model, "skip-init", batch={"inputs_embeds": X}):
        assert torch.equal(states(model, X)[-1], X[0].double())
    model, X = deep()
    assert residual(states(model, X)[-1]) < 0.5
    with fullrank.repair(model, "skip-init?start=0.2", batch={"inputs_embeds": X}):
        assert residual(states(model, X)[-1]) > 0.9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_norms_of_what_branches_add_are_taken_out_and_their_numbers_stay(family, start):
    case = normed(family)
    with torch.no_grad():
        with fullrank.repair(case.model, "skip-init?norms=remove", start=start, batch=case.batch) as repair:
            assert repair.parameters == 6
            assert not repair.notes
            first = case()
            added = {n: p for n, p in case.model.named_parameters() if n.endswith("alpha")}
            stir(added)
            alpha = [p.detach().clone() for _, p in sorted(added.items())]  # by layer, attention first
            found = case()
        with without(case.model, lambda layer, branch: start):
            close(first, case())
        with without(case.model, lambda layer, branch: alpha[2 * (layer - 1) + branch]):
            close(found, case())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scales_first", [True, False])
def test_a_scale_of_another_remedy_stays_where_the_norm_is_taken_out_under_it(family, scales_first):
    case = normed(family)
    remedies = ["residual-scale?by=number&alpha=0.7", "skip-init?norms=remove&start=0.5"]
    with torch.no_grad():
        with fullrank.repair(case.model, remedies if scales_first else remedies[::-1], batch=case.batch):
            found = case()
        with without(case.model, lambda layer, branch: 0.35):
            close(found, case())
