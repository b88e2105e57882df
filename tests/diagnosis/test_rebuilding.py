"""Research code that keeps its arguments is made again by its own class."""

import copy

import torch
from torch import nn
from twins import alike, moved, seeded, whole_state

from fullrank.diagnosis.initialisation import reinitialised
from untouched import changes


class Norm(nn.Module):
    """Root mean square, with a scale of its own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale / x.square().mean(-1, keepdim=True).sqrt()


class Config:
    def __init__(self, width=16, depth=3):
        self.width, self.depth = width, depth


class Research(nn.Module):
    """As research code is written: one configuration, norms of its own, projections smaller by depth."""

    loads = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.body = nn.ModuleList(nn.Sequential(Norm(width), nn.Linear(width, width)) for _ in range(config.depth))
        print("number of parameters", sum(p.numel() for p in self.parameters()))
        for block in self.body:
            nn.init.normal_(block[1].weight, std=0.3 / config.depth**0.5)
        if self.loads is not None:
            self.load_state_dict(self.loads)

    def forward(self, x):
        for block in self.body:
            x = x + block(x)
        return x


def test_a_model_that_holds_its_arguments_is_made_again_by_its_class(capsys):
    model = moved(seeded(lambda: Research(Config())))
    capsys.readouterr()
    before = whole_state(model)
    found = reinitialised(model, seed=7)
    assert not changes(before, whole_state(model))
    assert found.how == "Research built anew from its own arguments (config), seed 7."
    assert found.model.config is not model.config
    assert capsys.readouterr().out == ""
    assert alike(found.model, seeded(lambda: Research(Config()), 7))
    assert not found.model.training
    assert reinitialised(model.bfloat16(), seed=7).model.body[0][1].weight.dtype == torch.bfloat16


def test_a_model_that_is_another_than_its_arguments_say_is_not_made_again():
    model = moved(seeded(lambda: Research(Config())))
    model.config.depth = 2
    assert "Norm 'body.0.0' holds a parameter 'scale' of its own" in reinitialised(model, seed=7).how
    model = moved(seeded(lambda: Research(Config())))
    model.body[0][1] = nn.Bilinear(4, 4, 16)
    assert reinitialised(model, seed=7).model is None


def test_a_constructor_that_loads_its_weights_makes_no_reference(monkeypatch):
    model = moved(seeded(lambda: Research(Config())))
    monkeypatch.setattr(Research, "loads", copy.deepcopy(model.state_dict()))
    assert reinitialised(model, seed=7).model is None


def test_a_constructor_that_fails_makes_no_reference(monkeypatch):
    model = moved(seeded(lambda: Research(Config())))
    monkeypatch.setattr(Research, "loads", {"no": "weights"})
    assert reinitialised(model, seed=7).model is None


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), Norm(8))

    def forward(self, x):
        return self.body(x)


def test_a_class_without_arguments_makes_itself_again():
    found = reinitialised(moved(seeded(Fixed)), seed=7)
    assert found.how == "Fixed built anew by its constructor, seed 7."
    assert alike(found.model, seeded(Fixed, 7))
