"""Gradients flow through edits: they equal those of the twin and finite differences."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, build, center, naive, seen
from torch import nn

from fullrank.edit import find_branches, rewrite_attention, scale_branch, skip_block


def gradients(kind) -> dict[str, torch.Tensor]:
    kind.model.zero_grad()
    output = kind()
    probe = torch.linspace(-1, 1, output.numel()).reshape(output.shape).double()
    (output * probe).sum().backward()
    return {name: p.grad.clone() for name, p in kind.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KINDS)
def test_gradients_through_centred_attention_are_those_of_the_definition(name, monkeypatch):
    kind = build(name)
    with rewrite_attention(kind.model, seen(name), after=center):
        edited = gradients(kind)
    naive(monkeypatch, center=True)
    twin = gradients(kind)
    assert edited.keys() == twin.keys()
    for parameter, gradient in edited.items():
        scale = twin[parameter].abs().max()
        assert torch.allclose(gradient, twin[parameter], atol=1e-5 * max(1.0, float(scale))), parameter


@pytest.mark.parametrize("name", ["gpt2", "t5", "torch_encoder", "gemma2"])
def test_gradients_equal_finite_differences(name):
    kind, anatomy = build(name), seen(name)
    stack = anatomy.stacks[0].name
    temperature = nn.Parameter(torch.tensor(1.3).double())
    branches = find_branches(kind.model, kind, anatomy)
    alpha = nn.Parameter(torch.full((32,), 0.7).double())

    def warm(call):
        if call.query is not None:
            return call.change(query=call.query * temperature)
        return call.change(logits=call.logits * temperature)

    def loss() -> torch.Tensor:
        output = kind()
        return (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape).double()).sum()

    with (
        rewrite_attention(kind.model, anatomy, before=warm, after=center),
        scale_branch(kind.model, branches, by=alpha, stack=stack, layer=2, branch="mlp"),
        skip_block(kind.model, anatomy, stack=stack, layer=3),
    ):
        loss().backward()
        for parameter, index in ((temperature, ()), (alpha, (5,))):
            h = 1e-3 if name in ("gemma2", "t5") else 1e-6  # their norms are in float32
            with torch.no_grad():
                parameter[index] += h
                above = loss()
                parameter[index] -= 2 * h
                below = loss()
                parameter[index] += h
            difference = (above - below) / (2 * h)
            tolerance = 2e-2 if name in ("gemma2", "t5") else 1e-5
            assert torch.allclose(parameter.grad[index], difference, rtol=tolerance, atol=tolerance)


def test_a_skipped_block_gets_no_gradient_through_the_stream():
    kind = build("gpt2")
    with skip_block(kind.model, seen("gpt2"), layer=2):
        found = gradients(kind)
    assert not any(name.startswith("h.1.") for name in found)
    assert {"h.0.attn.c_attn.weight", "h.2.attn.c_attn.weight"} <= found.keys()
