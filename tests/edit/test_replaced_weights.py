"""Replacing a weight: other values in the same object, or a function in front of it; undone to the bit."""

from __future__ import annotations

import pytest
import torch
from kinds import build
from torch import nn

from fullrank.edit import reparametrize, replace_weight
from fullrank.errors import EditError

NAME = "h.1.attn.c_proj.weight"


class Gain(nn.Module):
    """W = g · V."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()).double())

    def forward(self, weight):
        return self.g * weight


@pytest.mark.parametrize("value", [0.0, torch.linspace(0, 1, 32).double(), lambda weight: weight.mT * 2])
def test_values_are_replaced_and_put_back_to_the_bit(value):
    kind = build("gpt2")
    parameter = kind.model.get_parameter(NAME)
    old = parameter.detach().clone()
    with torch.no_grad():
        base = kind()
        expected = value(old) if callable(value) else torch.as_tensor(value).expand(32, 32).double()
        with replace_weight(kind.model, NAME, value) as edit:
            assert kind.model.get_parameter(NAME) is parameter
            assert torch.equal(parameter, expected)
            assert torch.equal(kind.model.state_dict()[NAME], expected)
            assert not torch.equal(kind(), base)
            assert repr(edit) == f"<replace the values at {NAME}>"
        assert torch.equal(parameter, old)
        assert torch.equal(kind(), base)


def test_not_a_number_and_minus_zero_come_back():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-45]]))
    bits = model.weight.detach().view(torch.int32).clone()
    with replace_weight(model, "weight", 1.0):
        pass
    assert torch.equal(model.weight.detach().view(torch.int32), bits)


def test_a_tied_weight_is_replaced_wherever_it_is_used():
    import transformers as hf

    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).eval()
    with torch.no_grad(), replace_weight(model, "transformer.wte.weight", 0.0):
        assert (model(torch.tensor([[1, 2]])).logits == 0).all()
    with pytest.raises(EditError, match=r"transformer.wte.weight is shared by 2 modules"):
        reparametrize(model, "transformer.wte.weight", Gain())


def test_buffers_can_be_replaced():
    model = nn.BatchNorm1d(3).eval()
    with replace_weight(model, "running_mean", 5.0):
        assert (model.running_mean == 5).all()
    assert (model.running_mean == 0).all()


def test_edits_of_one_tensor_are_undone_in_reverse_order():
    model = nn.Linear(2, 2)
    old = model.weight.detach().clone()
    one = replace_weight(model, "weight", 1.0)
    two = replace_weight(model, "weight", 2.0)
    with pytest.raises(EditError, match="the values of weight were replaced again since; undo that first"):
        one.undo()
    assert (model.weight == 2).all() and one.in_force
    two.undo()
    assert (model.weight == 1).all()
    one.undo()
    assert torch.equal(model.weight, old)


def test_a_function_in_front_of_a_parameter_is_trained_with_it_and_taken_away():
    kind = build("gpt2")
    module = kind.model.h[1].attn.c_proj
    parameter, order, family = module.weight, list(kind.model.state_dict()), type(module)
    base = kind()
    gain = Gain()
    edit = reparametrize(kind.model, NAME, gain)
    assert edit.parameters == 1
    assert module.parametrizations.weight.original is parameter
    assert torch.equal(kind(), base)
    kind().square().sum().backward()
    assert gain.g.grad != 0 and parameter.grad is not None
    with torch.no_grad():
        gain.g.fill_(0)
    twin = build("gpt2")
    with torch.no_grad(), replace_weight(twin.model, NAME, 0.0):
        assert torch.allclose(kind(), twin(), atol=1e-12)
    edit.undo()
    assert module.weight is parameter and type(module) is family
    assert list(kind.model.state_dict()) == order
    assert torch.equal(kind(), base)


def test_functions_in_front_of_one_parameter_are_undone_in_any_order():
    model = nn.Linear(2, 2).double()
    parameter = model.weight
    half, double = Gain(), Gain()
    with torch.no_grad():
        half.g.fill_(0.5)
        double.g.fill_(4.0)
    one, two = reparametrize(model, "weight", half), reparametrize(model, "weight", double)
    assert torch.equal(model.weight, 2 * parameter)
    one.undo()
    assert torch.equal(model.weight, 4 * parameter)
    two.undo()
    assert model.weight is parameter
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


class Cut(nn.Module):
    def forward(self, weight):
        return weight[:1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: replace_weight(model, "weigth", 0.0), "'weigth' is no parameter or buffer of this Linear"),
        (lambda model: replace_weight(model, "weight", torch.zeros(3)), r"weight is \(2, 2\), and the value for it is"),
        (lambda model: reparametrize(model, "weight", Cut()), "weight cannot be reparametrised"),
        (lambda model: replace_weight(nn.Linear(2, 2, device="meta"), "weight", 0.0), "weight is offloaded"),
        (lambda model: reparametrize(nn.Linear(2, 2, device="meta"), "weight", Gain()), "weight is offloaded"),
        (
            lambda model: replace_weight(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "weight", 0.0),
            "weight is made by a parametrisation and has no values of its own",
        ),
        (lambda model: reparametrize(nn.BatchNorm1d(2), "running_mean", Gain()), "running_mean is a buffer"),
    ],
)
def test_what_cannot_be_replaced_is_refused(change, sentence):
    model = nn.Linear(2, 2)
    kept = (model.weight, model.weight.detach().clone(), type(model))
    with pytest.raises(EditError, match=sentence):
        change(model)
    assert model.weight is kept[0] and torch.equal(model.weight, kept[1]) and type(model) is kept[2]
