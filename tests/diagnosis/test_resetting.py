"""A copy that is reset module by module: what its class draws, or a sentence."""

import pytest
import torch
from plain import PlainGPT
from torch import nn
from twins import Scale, alike, llama, moved, seeded, whole_state

from fullrank.diagnosis.initialisation import reinitialised
from untouched import changes

MAKERS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32),
    "pair": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "recurrent": lambda: nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.LSTM(8, 8, 2)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.Conv2d(8, 3, 3)),
    "plain code": PlainGPT,
}


@pytest.mark.parametrize("name", MAKERS)
def test_any_other_model_is_reset_to_what_its_class_gives_by_itself(name):
    model = moved(seeded(MAKERS[name]))
    for buffer in model.buffers():
        buffer += 3
    model.train()
    before = whole_state(model)
    found = reinitialised(model, seed=7)
    assert not changes(before, whole_state(model))
    assert found.model is not None, found.how
    assert alike(found.model, seeded(MAKERS[name], 7))
    assert not any(module.training for module in found.model.modules())
    assert "reset module by module" in found.how
    assert found.how.endswith("seed 7.")


def test_layers_that_torch_copies_from_each_other_are_drawn_one_by_one():
    layer = seeded(lambda: nn.TransformerEncoderLayer(16, 2, 32))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    twin = reinitialised(model, seed=1).model
    assert torch.equal(model.layers[0].linear1.weight, model.layers[1].linear1.weight)
    assert not torch.equal(twin.layers[0].linear1.weight, twin.layers[1].linear1.weight)
    assert twin.layers[1].linear1.weight.std().item() == pytest.approx(layer.linear1.weight.std().item(), rel=0.1)


class Initialises(nn.Module):
    """Weights as its author wants them, on top of what torch draws."""

    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.constant_(module.bias, 0.25)

    def forward(self, x):
        return self.body(x)


class Resettable(Scale):
    def reset_parameters(self):
        nn.init.constant_(self.scale, 1.0)


def test_what_an_author_does_with_modules_is_done_after_they_are_reset():
    twin = reinitialised(moved(seeded(Initialises)), seed=7).model
    assert alike(twin, seeded(Initialises, 7))
    assert twin.body[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(twin.body[2].bias, torch.full((64,), 0.25))


def test_a_module_with_a_way_of_its_own_is_reset():
    twin = reinitialised(moved(nn.Sequential(nn.Linear(8, 8), Resettable())), seed=1).model
    assert torch.equal(twin[1].scale, torch.ones(8))


def test_a_parameter_that_is_still_constant_is_where_it_started():
    found = reinitialised(nn.Sequential(nn.Linear(8, 8), Scale(), Scale()), seed=1)
    assert torch.equal(found.model[2].scale, torch.ones(8))
    assert "2 constant parameters kept" in found.how


def test_a_hugging_face_model_inside_another_module_is_initialised_by_its_own_method():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = llama(initializer_range=0.5), nn.Linear(16, 3)

    twin = reinitialised(moved(Reader()), seed=1).model
    assert twin.trunk.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(twin.trunk.norm.weight, torch.ones(16))


def test_a_copy_that_fails_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].kept = model[0].weight * 2  # a tensor with a history, as a cache that was never let go
    found = reinitialised(model, seed=1)
    assert found.model is None
    assert "Sequential cannot be copied (" in found.how


def test_a_way_that_fails_is_refused():
    class Fails(nn.Linear):
        def reset_parameters(self):
            if hasattr(self, "made"):
                raise ValueError("only once.")

    model = nn.Sequential(Fails(8, 8))
    model[0].made = True
    found = reinitialised(model, seed=1)
    assert found.how == "no reference at initialisation: reset_parameters of Fails '0' failed (only once)."
