"""Centring, shaping and subtracting maps: one graph for a compiler, half precision under autocast, checkpointed."""

import pytest
import torch
from remedy_patients import build
from torch.utils.checkpoint import checkpoint

import fullrank
from fullrank.capture import survey

REMEDIES = (
    "center-attention",
    "center-attention?gain=energy&learn=true",
    "gain-control",
    "attn-scale?start=1",
    "feat-scale?low=-0.5&high=0.5",
    "differential?start=0.5",
    "shaped?start=skipless",
)


SOON = ("center-attention", "feat-scale?low=-0.5&high=0.5")
"""What is compiled in every run of the tests."""


@pytest.mark.parametrize(
    ("remedy", "patient"),
    [
        pytest.param(r, p, marks=() if r in SOON and p == "zoo_decoder" else pytest.mark.slow)
        for r in REMEDIES
        for p in ("zoo_decoder", "zoo_vision")
    ],
)
def test_a_repaired_model_compiles_into_one_graph(remedy, patient):
    torch.compiler.reset()
    case = build(patient)
    with fullrank.repair(case.model, remedy, batch=case.batch), torch.no_grad():
        expected = case()
        compiled = torch.compile(case.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(case.answer(compiled), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_deflation_compiles_too():
    torch.compiler.reset()
    case = build("zoo_vision")
    with fullrank.repair(case.model, "deflate-attention", batch=case.batch), torch.no_grad():
        expected = case()
        compiled = torch.compile(case.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(case.answer(compiled), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("remedy", [*REMEDIES, "deflate-attention"])
def test_autocast_changes_no_more_than_half_precision_does(remedy):
    case = build("zoo_vision")
    case.model.float()
    case.batch = {name: value.float() for name, value in case.batch.items()}
    with fullrank.repair(case.model, remedy, batch=case.batch):
        expected = case().detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = case()
        found.float().square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in case.model.parameters())
        assert float((found.detach().float() - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("remedy", REMEDIES)
def test_checkpointed_blocks_have_the_same_gradients(remedy):
    case = build("zoo_decoder")
    with fullrank.repair(case.model, remedy, batch=case.batch):
        gradients = []
        for again in (False, True):
            blocks = [case.model.get_submodule(path) for path in _paths(case)]
            kept = [block.forward for block in blocks]
            for block in blocks if again else ():
                block.forward = _checkpointed(block.forward)
            case().square().sum().backward()
            gradients.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
            for block, forward in zip(blocks, kept, strict=True):
                block.forward = forward
            case.model.zero_grad(set_to_none=True)
        for plain, again in zip(*gradients, strict=True):
            torch.testing.assert_close(again, plain)


def _paths(case):
    with torch.no_grad():
        return survey(case.model, case).stacks[0].paths


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
