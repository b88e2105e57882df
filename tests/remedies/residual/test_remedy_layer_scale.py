"""LayerScale: a number for each feature of each branch."""

import pytest
import torch
from blocks import NAMES, by_hand, close, repaired
from schemes import deep, residual, states

import fullrank

PLACE = {"attention": 0, "mlp": 1}


@pytest.mark.parametrize("name", NAMES)
def test_each_feature_of_each_branch_has_a_number(name):
    found, gamma = repaired(name, "layer-scale")
    assert [g.shape for g in gamma] == [(32,)] * 6
    close(found, by_hand(name, lambda layer, b, X, F: X + gamma[2 * (layer - 1) + PLACE[b]] * F))


@pytest.mark.parametrize(("depth", "start", "expected"), [(2, "none", 1e-5), (2, "0.3", 0.3), (25, "none", 1e-6)])
def test_where_it_starts(depth, start, expected):
    model, X = deep(depth, width=16)
    with fullrank.repair(model, f"layer-scale?start={start}", batch={"inputs_embeds": X}) as repair:
        gammas = [p for n, p in model.named_parameters() if "fullrank" in n]
        assert len(gammas) == 2 * depth
        assert repair.parameters == 2 * depth * 16
        assert all(torch.equal(g, torch.full((16,), expected)) for g in gammas)


def test_at_first_tokens_pass_almost_unchanged():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    with fullrank.repair(model, "layer-scale", batch={"inputs_embeds": X}):
        assert residual(states(model, X)[-1]) > 0.98
