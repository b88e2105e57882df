"""Leaving an edit: what was added is gone as after undoing, and trained values stay."""

from __future__ import annotations

import pytest
import torch
from kinds import build, center, seen
from torch import nn

from fullrank.edit import (
    edits_in,
    find_branches,
    reparametrize,
    replace_module,
    replace_weight,
    rewrite_attention,
    rewrite_block,
    rewrite_residual,
    scale_branch,
    skip_block,
    together,
)
from fullrank.errors import EditError
from untouched import changes, everything

NAME = "h.1.attn.c_proj.weight"
OTHER = "h.0.mlp.c_proj.weight"


class Gain(nn.Module):
    """W = g · V."""

    def __init__(self, g: float = 0.5) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g).double())

    def forward(self, *given):
        return self.g * given[-1]


class Normalised(nn.Module):
    """W = V / σ, with a step of a power iteration in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.linspace(-1, 1, 32).double())

    def forward(self, V):
        if self.training:
            with torch.no_grad():
                self.u = nn.functional.normalize(V @ (V.mT @ self.u), dim=0)
        return V / (V.mT @ self.u).norm()


def trained(kind, steps: int = 3) -> None:
    optimiser = torch.optim.SGD(kind.model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        kind().square().mean().backward()
        optimiser.step()
    optimiser.zero_grad()


def test_replaced_values_stay_as_they_were_trained():
    kind = build("gpt2")
    parameter = kind.model.get_parameter(NAME)
    edit = replace_weight(kind.model, NAME, lambda weight: 2 * weight)
    replaced = parameter.detach().clone()
    trained(kind)
    now = parameter.detach().clone()
    assert not torch.equal(now, replaced)
    edit.leave()
    edit.leave()  # nothing more happens
    edit.undo()
    assert not edit.in_force
    assert kind.model.get_parameter(NAME) is parameter
    assert torch.equal(parameter, now)
    with replace_weight(kind.model, NAME, 0.0):  # nobody remembers the edit
        pass
    assert torch.equal(parameter, now)


def test_of_two_replacements_the_last_is_left_first_and_the_first_still_puts_its_values_back():
    kind = build("gpt2")
    parameter = kind.model.get_parameter(NAME)
    old = parameter.detach().clone()
    first, second = (replace_weight(kind.model, NAME, value) for value in (1.0, 2.0))
    with pytest.raises(EditError, match="were replaced again since; undo that first"):
        first.leave()
    assert first.in_force and bool((parameter == 2).all())
    second.leave()
    assert bool((parameter == 2).all())
    first.undo()
    assert torch.equal(parameter, old)


@pytest.mark.parametrize("how", ["undo", "leave"])
def test_replacements_of_one_weight_under_a_common_handle_are_taken_back_together(how):
    kind = build("gpt2")
    parameter = kind.model.get_parameter(NAME)
    old = parameter.detach().clone()
    both = together([replace_weight(kind.model, NAME, 1.0), replace_weight(kind.model, NAME, 2.0)])
    third = replace_weight(kind.model, NAME, 3.0)
    with pytest.raises(EditError, match="were replaced again since; undo that first"):
        getattr(both, how)()
    third.undo()
    getattr(both, how)()
    assert torch.equal(parameter, old if how == "undo" else torch.full_like(old, 2.0))


def test_a_reparametrised_weight_keeps_its_present_value():
    kind = build("gpt2")
    names, parameter = list(kind.model.state_dict()), kind.model.get_parameter(NAME)
    edit = reparametrize(kind.model, NAME, Gain())
    trained(kind)
    W = kind.model.h[1].attn.c_proj.weight.detach().clone()
    with torch.no_grad():
        edited = kind()
    edit.leave()
    assert list(kind.model.state_dict()) == names
    assert kind.model.get_parameter(NAME) is parameter and parameter.requires_grad
    assert torch.equal(parameter, W)
    with torch.no_grad():
        assert torch.equal(kind(), edited)


def test_asking_for_the_value_takes_no_step():
    kind = build("gpt2")
    kind.model.train()
    function = Normalised()
    edit = reparametrize(kind.model, NAME, function)
    trained(kind, 1)
    used = kind.model.h[1].attn.c_proj.weight.detach().clone()
    u = function.u.clone()
    edit.leave()
    assert torch.equal(kind.model.get_parameter(NAME), used)
    assert torch.equal(function.u, u)
    assert function.training


def test_of_two_functions_the_inner_is_left_first():
    kind = build("gpt2")
    inner, outer = reparametrize(kind.model, NAME, Gain(0.5)), reparametrize(kind.model, NAME, Gain(3.0))
    W = kind.model.h[1].attn.c_proj.weight.detach().clone()
    with pytest.raises(EditError, match=r"c_proj\.weight was reparametrised before: its present value cannot be kept"):
        outer.leave()
    assert outer.in_force
    inner.leave()
    assert torch.allclose(kind.model.h[1].attn.c_proj.weight, W, atol=1e-14)
    outer.leave()
    assert torch.allclose(kind.model.get_parameter(NAME), W, atol=1e-14)
    both = together([reparametrize(kind.model, NAME, Gain(0.5)), reparametrize(kind.model, NAME, Gain(3.0))])
    both.leave()
    assert torch.allclose(kind.model.get_parameter(NAME), 1.5 * W, atol=1e-14)
    assert not hasattr(kind.model.h[1].attn.c_proj, "parametrizations")


FORWARDS = {
    "skip": lambda kind, anatomy: skip_block(kind.model, anatomy, layer=2),
    "block": lambda kind, anatomy: rewrite_block(kind.model, anatomy, Gain(), layer=2),
    "attention": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, after=center),
    "module in attention": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, after=Gain(), layer=1),
    "branch": lambda kind, anatomy: scale_branch(
        kind.model, find_branches(kind.model, kind, anatomy), by=nn.Parameter(torch.tensor(0.5).double())
    ),
    "residual": lambda kind, anatomy: rewrite_residual(
        kind.model, anatomy, find_branches(kind.model, kind, anatomy), Gain()
    ),
    "module": lambda kind, anatomy: replace_module(kind.model, "ln_f", lambda run, x: 2 * run(x)),
}


@pytest.mark.parametrize("what", FORWARDS)
def test_what_changes_a_forward_is_gone_as_after_undoing(what):
    kind, anatomy = build("gpt2"), seen("gpt2")
    with torch.no_grad():
        base = kind()
        before = everything(kind.model)
        edit = FORWARDS[what](kind, anatomy)
        assert not torch.allclose(kind(), base, atol=1e-4)
        edit.leave()
        assert not edits_in(kind.model)
        assert not changes(before, everything(kind.model))
        assert torch.equal(kind(), base)


def test_a_remedy_of_several_edits_is_left_as_a_whole():
    kind, anatomy = build("gpt2"), seen("gpt2")
    names = list(kind.model.state_dict())
    edit = together(
        [
            replace_weight(kind.model, OTHER, lambda weight: 0.5 * weight),
            reparametrize(kind.model, NAME, Gain()),
            rewrite_attention(kind.model, anatomy, after=Gain()),
        ]
    )
    trained(kind)
    weights = [kind.model.get_parameter(OTHER).detach().clone(), kind.model.h[1].attn.c_proj.weight.detach().clone()]
    edit.leave()
    assert list(kind.model.state_dict()) == names
    assert torch.equal(kind.model.get_parameter(OTHER), weights[0])
    assert torch.equal(kind.model.get_parameter(NAME), weights[1])


def test_where_undoing_is_refused_leaving_is_too():
    kind, anatomy = build("gpt2"), seen("gpt2")
    edit = skip_block(kind.model, anatomy, layer=2)
    inner = kind.model.h[1].forward
    kind.model.h[1].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(EditError, match="the forward of a GPT2Block was replaced after it was edited"):
        edit.leave()
    assert edit.in_force
    kind.model.h[1].forward = inner
    edit.leave()
    assert not edits_in(kind.model)
