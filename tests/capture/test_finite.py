"""The first parameter and the first module that are not finite are named, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fullrank.capture.finite import first_nonfinite_module, first_nonfinite_parameter

FAULTS = (torch.nan, torch.inf, -torch.inf)


class Fault(nn.Module):
    """Puts `value` into one entry of what it is given; returns it as the first of two outputs."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x, mask=None):
        x = x.clone()
        x[0, 1] = self.value
        return x, mask


class Layer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 4), inner, nn.Identity()

    def forward(self, x, mask=None):
        x = self.inner(self.before(x), mask)
        return self.after(x[0]), mask


def network(*inner: nn.Module) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(one) for one in inner)


def run(model, mask=None):
    x = torch.ones(3, 4)
    for layer in model:
        x, mask = layer(x, mask)
    return x


class Harmless(nn.Module):
    def forward(self, x, mask=None):
        return x.tanh(), mask


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_parameter_with_a_fault_is_named(fault):
    model = network(Harmless(), Harmless())
    assert first_nonfinite_parameter(model) is None
    with torch.no_grad():
        model[1].before.weight[2, 1] = fault
        model[1].before.bias[0] = fault
    assert first_nonfinite_parameter(model) == "1.before.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float16])
def test_parameters_of_few_bits_are_looked_at_too(dtype):
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]).to(dtype), requires_grad=False)
    assert first_nonfinite_parameter(model) is None
    model.scale = nn.Parameter(torch.tensor([1.0, torch.nan, 4.0]).to(dtype), requires_grad=False)
    assert first_nonfinite_parameter(model) == "scale"


def test_packed_integer_meta_and_empty_parameters_are_passed_over():
    model = nn.Module()
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model.packed = nn.Parameter(packed, requires_grad=False)
    model.integer = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.meta = nn.Parameter(torch.empty(3, device="meta"))
    model.empty = nn.Parameter(torch.empty(0))
    assert first_nonfinite_parameter(model) is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mask", [None, torch.tensor([0.0, -torch.inf])])
def test_the_innermost_module_that_made_the_fault_is_named(fault, mask):
    model = network(Harmless(), Fault(fault), Harmless())
    # neither `1.after`, which hands it on, nor the layer around, nor layer 2
    assert first_nonfinite_module(model, lambda: run(model, mask)) == "1.inner"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_that_only_hands_on_is_not_named(fault):
    model = network(nn.Identity())
    layer = model[0].after
    assert first_nonfinite_module(layer, lambda: layer(torch.tensor([[0.0, fault]]))) is None


def test_a_mask_of_minus_infinity_is_no_fault():
    model = network(Harmless(), Harmless())
    mask = torch.full((3, 3), -torch.inf).triu(1)
    assert first_nonfinite_module(model, lambda: run(model, mask)) is None


def test_a_softmax_over_nothing_but_masked_scores_is_named():
    softmax = nn.Softmax(-1)
    assert first_nonfinite_module(softmax, lambda: softmax(torch.tensor([[0.0, -torch.inf]]))) is None
    assert first_nonfinite_module(softmax, lambda: softmax(torch.full((2, 2), -torch.inf))) == "Softmax"


def test_hooks_are_gone_after_a_forward_that_fails():
    model = network(Harmless())
    with pytest.raises(RuntimeError):
        first_nonfinite_module(model, lambda: model[0](torch.ones(3, 5)))
    assert not any(module._forward_hooks for module in model.modules())
