"""Peri-LN: what branches add, by hand and in models built with it."""

import math

import pytest
import stages
import torch
from blocks import NAMES as ALL
from blocks import POST, by_hand, close, repaired
from schemes import deep, repaired_states, states, variance
from stages import last_maps, staged

import fullrank
from fullrank.errors import RemedyError

PLACE = {"attention": 0, "mlp": 1}
NAMES = [name for name in ALL if name not in POST]
EPS = {"gpt2": 1e-5, "llama_padded": 1e-6, "vit": 1e-12, "plain": 1e-5}


def normalised(F, eps, gain, shift=None):
    F = F.double()
    if shift is not None:
        F = F - F.mean(-1, keepdim=True)
    return gain * F / (F.square().mean(-1, keepdim=True) + eps).sqrt() + (0 if shift is None else shift)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["own", "rms"])
def test_what_branches_add_is_normalised(name, kind):
    found, added = repaired(name, "peri-norm", kind=kind)
    layer_norm = kind == "own" and name != "llama_padded"
    assert [p.shape for p in added] == [(32,)] * (12 if layer_norm else 6)

    def add(layer, branch, X, F):
        at = 2 * (layer - 1) + PLACE[branch]
        own = added[2 * at : 2 * at + 2] if layer_norm else added[at : at + 1]
        return X + normalised(F, EPS[name], *own)

    close(found, by_hand(name, add), 1e-5 if name == "llama_padded" else 1e-9)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_plain_model_becomes_the_one_that_is_built_with_it(norm):
    model, X = deep(3, width=32, norm=norm)
    twin, _ = deep(3, width=32, norm=norm, placement="peri")
    with torch.no_grad(), fullrank.repair(model, "peri-norm", batch={"inputs_embeds": X}):
        close(model(inputs_embeds=X).logits, twin(inputs_embeds=X).logits, 1e-4)


@pytest.mark.parametrize("placement", ["post", "peri", "res-post"])
def test_models_that_do_not_read_through_norms_alone_are_refused(placement):
    model, X = deep(2, width=32, placement=placement)
    with pytest.raises(RemedyError, match=rf"stand otherwise \({placement}\)"):
        fullrank.repair(model, "peri-norm", batch={"inputs_embeds": X})


@pytest.mark.parametrize("name", ["swin", "segformer"])
def test_each_stage_has_norms_of_its_own_width(name):
    case = staged(name)
    found, added = stages.repaired(case, "peri-norm")
    assert [[len(p) for p in each] for each in added] == [[16, 16]] * 4 + [[32, 32]] * 4
    for last, own in zip(last_maps(case.model), added, strict=True):
        last.register_forward_hook(lambda module, args, F, own=own: normalised(F, 1e-5, *own))
    for block in [m for m in case.model.modules() if hasattr(m, "layernorm_before")]:
        assert {block.layernorm_before.eps, block.layernorm_after.eps} == {1e-5}
    with torch.no_grad():
        close(found, case(), 1e-8)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_where_branches_read_through_batch_norms_the_kind_is_asked_for(kind):
    model, X = deep(2, width=32, norm="batchnorm")
    with pytest.raises(
        RemedyError, match="is a batch norm, and peri-norm makes none such; choose kind=layer or kind=rms"
    ):
        fullrank.repair(model, "peri-norm", batch={"inputs_embeds": X})
    with fullrank.repair(model, "peri-norm", kind=kind, batch={"inputs_embeds": X}) as repair:
        assert repair.parameters == 4 * 32 * (2 if kind == "layer" else 1)


def test_however_large_the_weights_the_stream_grows_by_two_per_block():
    options = {"value_std": 5.0, "output_std": 5.0, "down_std": 10.0}
    model, X = deep(**options)
    assert variance(states(model, X)[-1]) > 1000
    found = [variance(one) for one in repaired_states(model, X, "peri-norm")]
    for layer, size in enumerate(found[1:], 1):  # 1, and 1 for each branch, where these are not alike
        assert math.isclose(size, 1 + 2 * layer, rel_tol=0.2)
