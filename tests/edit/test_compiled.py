"""Edits and `torch.compile`: made before or after compiling, taken back, in one graph."""

from __future__ import annotations

import pytest
import torch
from kinds import build, center, seen
from torch import nn

from fullrank.edit import (
    find_branches,
    reparametrize,
    replace_heads,
    replace_stream,
    replace_weight,
    rewrite_attention,
    rewrite_block,
    scale_branch,
    skip_block,
)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, *args):
        return args[-1] * self.factor


def warm(call):
    if call.query is not None:
        return call.change(query=call.query * 2, value=call.value + 1)
    return call.change(logits=call.logits * 2, value=call.value + 1)


def first(kind) -> str:
    return f"{next(iter(kind.lists.values()))}.0.{next(iter(kind.mlp.values()))}.weight"


EDITS = {
    "skip": lambda kind, anatomy: skip_block(kind.model, anatomy, layer=2),
    "stream": lambda kind, anatomy: replace_stream(kind.model, anatomy, lambda X: X.mean(1, keepdim=True), layer=1),
    "block": lambda kind, anatomy: rewrite_block(kind.model, anatomy, Half(), layer=2),
    "attention": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, before=warm, after=center),
    "module": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, after=Half(), layer=1),
    "heads": lambda kind, anatomy: replace_heads(kind.model, anatomy, 0.0, heads=[1, 2]),
    "branch": lambda kind, anatomy: scale_branch(kind.model, find_branches(kind.model, kind, anatomy), by=0.5),
    "parameter": lambda kind, anatomy: scale_branch(
        kind.model, find_branches(kind.model, kind, anatomy), by=nn.Parameter(torch.tensor(0.5).double())
    ),
    "values": lambda kind, anatomy: replace_weight(kind.model, first(kind), lambda weight: weight * 2),
    "function": lambda kind, anatomy: reparametrize(kind.model, first(kind), Half()),
}

NAMES = ("gpt2", "plain", "plain_softmax", "torch_with_weights", "torch_tokens_first")
CASES = [("plain", what) for what in EDITS] + [(name, "attention") for name in NAMES if name != "plain"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_one_graph(kind, backend: str = "aot_eager"):
    # a function around it: of `nn.TransformerEncoder` called by nobody torch compiles nothing, edited or not
    compiled = torch.compile(lambda *args, **more: kind.model(*args, **more), backend=backend, fullgraph=True)

    def run() -> torch.Tensor:
        output = compiled(*kind.called, **kind.batch)
        return output if isinstance(output, torch.Tensor) else output[0]

    return run


def test_a_model_that_was_compiled_follows_its_edits_and_forgets_them():
    # all that act by a forward of their own at once: compiling anew is dear
    kind, anatomy = build("plain"), seen("plain")
    compiled = in_one_graph(kind, "eager")
    with torch.no_grad():
        base = kind()
        assert torch.allclose(compiled(), base, atol=1e-10)
        with EDITS["attention"](kind, anatomy), EDITS["branch"](kind, anatomy), EDITS["skip"](kind, anatomy):
            edited = kind()
            assert not torch.allclose(edited, base, atol=1e-3)
            assert torch.allclose(compiled(), edited, atol=1e-10)
        assert torch.allclose(compiled(), base, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the tracer's
@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_compiled_model_follows_its_edits(name, what):
    kind, anatomy = build(name), seen(name)
    base = kind()
    after = in_one_graph(kind)
    assert torch.allclose(after(), base, atol=1e-10)
    edit = EDITS[what](kind, anatomy)  # after compiling
    edited = kind()
    assert not torch.allclose(edited, base, atol=1e-3)
    assert torch.allclose(after(), edited, atol=1e-10)
    kind.model.zero_grad()
    after().square().sum().backward()
    compiled = [p.grad.clone() for p in kind.model.parameters() if p.grad is not None]
    kind.model.zero_grad()
    kind().square().sum().backward()
    eager = [p.grad for p in kind.model.parameters() if p.grad is not None]
    assert len(compiled) == len(eager) > 0
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(compiled, eager, strict=True))
    edit.undo()
    assert torch.allclose(after(), base, atol=1e-10)
    torch._dynamo.reset()
    with EDITS[what](kind, anatomy):
        before = in_one_graph(kind)  # before compiling
        assert torch.allclose(before(), edited, atol=1e-10)
    assert torch.allclose(before(), base, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_a_block_that_is_compiled_by_itself_follows_too(name):
    kind, anatomy = build(name), seen(name)
    with torch.no_grad():
        base = kind()
        for block in kind.blocks("decoder"):
            block.compile(backend="eager", fullgraph=True)
        assert torch.allclose(kind(), base, atol=1e-10)
        plain = build(name)
        with (
            rewrite_attention(kind.model, anatomy, after=center),
            rewrite_attention(plain.model, anatomy, after=center),
        ):
            assert torch.allclose(kind(), plain(), atol=1e-10)
        assert torch.allclose(kind(), base, atol=1e-10)


@pytest.mark.slow
def test_layers_of_a_shared_block_are_told_apart_in_a_graph():
    kind, anatomy = build("albert"), seen("albert")
    with torch.no_grad(), rewrite_attention(kind.model, anatomy, after=center, layer=2):
        assert torch.allclose(in_one_graph(kind)(), kind(), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_inductor_computes_the_same(name):
    kind, anatomy = build(name), seen(name)
    compiled = torch.compile(kind.model, fullgraph=True)
    with torch.no_grad():
        compiled(**kind.batch)
        with rewrite_attention(kind.model, anatomy, before=warm, after=center):
            assert torch.allclose(compiled(**kind.batch)[0], kind(), atol=1e-5)
