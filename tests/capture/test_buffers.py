"""Buffers have their values back after a look, however they were written."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fullrank.capture import undisturbed


def add(model):
    model.state.add_(1)


def write_through_data(model):
    model.state.data.fill_(7)


def replace_data(model):
    model.state.data = torch.zeros(5, dtype=torch.float64)


def replace_object(model):
    model.state = torch.zeros(5)


WRITES = (add, write_through_data, replace_data, replace_object)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.arange(3.0))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("looked_at_in_inference", [False, True])
@pytest.mark.parametrize("made_in_inference", [False, True])
def test_a_buffer_has_its_value_back(write, made_in_inference, looked_at_in_inference):
    with torch.inference_mode(made_in_inference):
        model = Stateful()
    before = model.state
    assert before.is_inference() == made_in_inference
    with torch.inference_mode(looked_at_in_inference), undisturbed(model):
        with torch.inference_mode() if made_in_inference else contextlib.nullcontext():
            write(model)
        assert not torch.equal(model.state, torch.arange(3.0, dtype=model.state.dtype))
    assert model.state is before
    assert model.state.dtype == torch.float32
    assert torch.equal(model.state, torch.arange(3.0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.bool])
def test_buffers_of_every_type_have_their_values_back(dtype):
    model = Stateful()
    model.state = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    with undisturbed(model):
        model.state.copy_(torch.tensor([1.0, 0.0, 1.0]).to(dtype))
    assert model.state.float().tolist() == [0.0, 1.0, 1.0]


def test_an_untouched_buffer_is_not_written_so_that_a_graph_that_saved_it_still_works():
    model = Stateful()
    x = torch.ones(3, requires_grad=True)
    y = (x * model.state).sum()
    with undisturbed(model):
        pass
    y.backward()
    assert torch.equal(x.grad, torch.arange(3.0))
