"""After an edit is undone nothing is left of it: not on the model, not on the process, whatever happened meanwhile."""

from __future__ import annotations

import itertools

import pytest
import torch
from kinds import KINDS, build, center, seen
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fullrank.edit import (
    edits_in,
    find_branches,
    reparametrize,
    replace_heads,
    replace_stream,
    replace_weight,
    rewrite_attention,
    rewrite_block,
    scale_branch,
    skip_block,
    together,
)
from fullrank.errors import EditError
from untouched import changes, everything


def state(model):
    """But for how often weights were written: one that an edit replaces is written back."""
    return {what: value for what, value in everything(model).items() if what != "versions"}


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, *args):
        return args[-1] * self.factor + 0.1  # a norm may follow that takes a factor away


def drawn(kind) -> torch.Tensor:
    """The output with dropout, from the same draws."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = kind()
    torch.manual_seed(1)
    return output


def parameter_of(kind) -> str:
    stack = next(iter(kind.lists))
    return f"{kind.lists[stack]}.1.{kind.mlp[stack]}.weight"


EDITS = {
    "skip": lambda kind, anatomy: skip_block(kind.model, anatomy, stack=anatomy.stacks[-1].name, layer=2),
    "stream": lambda kind, anatomy: replace_stream(kind.model, anatomy, 0.1, stack=anatomy.stacks[0].name, layer=1),
    "block": lambda kind, anatomy: rewrite_block(kind.model, anatomy, Half(), stack=anatomy.stacks[0].name, layer=2),
    "attention": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, after=center),
    "module": lambda kind, anatomy: rewrite_attention(kind.model, anatomy, after=Half(), layer=1),
    "heads": lambda kind, anatomy: replace_heads(kind.model, anatomy, 0.0, heads=1),
    "branch": lambda kind, anatomy: scale_branch(kind.model, find_branches(kind.model, kind, anatomy), by=0.5),
    "parameter": lambda kind, anatomy: scale_branch(
        kind.model, find_branches(kind.model, kind, anatomy), by=nn.Parameter(torch.tensor(0.5).double()), layer=2
    ),
    "values": lambda kind, anatomy: replace_weight(kind.model, parameter_of(kind), lambda weight: weight * 2 + 0.1),
    "function": lambda kind, anatomy: reparametrize(kind.model, parameter_of(kind), Half()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_edit_acts_and_is_undone_to_the_bit(name):
    kind, anatomy = build(name), seen(name)
    kind.model.train()
    next(iter(kind.model.children())).eval()  # a frozen part among training ones
    base = drawn(kind)
    before = state(kind.model)
    for make in EDITS.values():
        edit = make(kind, anatomy)
        assert not torch.allclose(drawn(kind), base, atol=1e-6)
        edit.undo()
        edit.undo()  # nothing more happens
        assert not changes(before, state(kind.model))
        assert torch.equal(drawn(kind), base)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "torch_encoder", "plain"])
@pytest.mark.parametrize("what", EDITS)
def test_an_exception_inside_leaves_nothing_either(name, what):
    kind, anatomy = build(name), seen(name)
    before = state(kind.model)
    blocks = kind.blocks(next(iter(kind.lists)))

    def fail(module, args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), torch.no_grad(), EDITS[what](kind, anatomy):
        handle = blocks[2].register_forward_pre_hook(fail)
        try:
            kind()
        finally:
            handle.remove()
    assert not changes(before, state(kind.model))


def test_edits_are_undone_in_any_order():
    kind, anatomy = build("llama"), seen("llama")
    whats = ("skip", "attention", "branch", "values")
    with torch.no_grad():
        base = kind()
        before = state(kind.model)
        for order in list(itertools.permutations(range(len(whats))))[::5]:
            edits = [EDITS[what](kind, anatomy) for what in whats]
            for index in order:
                edits[index].undo()
            assert not changes(before, state(kind.model))
            assert torch.equal(kind(), base)


def test_several_edits_are_one_handle():
    kind, anatomy = build("gpt2"), seen("gpt2")
    before = state(kind.model)
    with together([EDITS["skip"](kind, anatomy), EDITS["module"](kind, anatomy)]) as both:
        assert both.parameters == 1
        assert repr(both).startswith(
            "<skip the block; rewrite attention at decoder layer 2 (h.1), decoder layer 1 self"
        )
        assert len(edits_in(kind.model)) == 2
    assert not changes(before, state(kind.model))


def test_a_forward_that_stood_there_is_used_and_put_back():
    kind, anatomy = build("gpt2"), seen("gpt2")
    block = kind.model.h[1]
    calls = []
    original = block.forward

    def wrapped(*args, **kwargs):  # as accelerate's hooks do
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = wrapped
    with torch.no_grad():
        base = kind()
        with (
            scale_branch(kind.model, find_branches(kind.model, kind, anatomy), by=1.0),
            replace_stream(kind.model, anatomy, lambda state: state, layer=2),
        ):
            calls.clear()
            assert torch.equal(kind(), base)
            assert calls == [1]
    assert block.forward is wrapped


def test_a_forward_that_was_replaced_meanwhile_is_not_lost():
    kind, anatomy = build("gpt2"), seen("gpt2")
    block = kind.model.h[1]
    edit = skip_block(kind.model, anatomy, layer=2)
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    foreign = block.forward
    with pytest.raises(EditError, match="the forward of a GPT2Block was replaced after it was edited"):
        edit.undo()
    assert block.forward is foreign and edit.in_force
    block.forward = inner
    edit.undo()
    assert "forward" not in vars(block)


def test_an_edit_that_fails_halfway_is_taken_back():
    kind, anatomy = build("gpt2"), seen("gpt2")
    kind.model.h[2].attn.gate_after = None  # the name is taken in the last layer
    before = state(kind.model)
    with pytest.raises(EditError, match="name='gate_after' is taken in a GPT2Attention"):
        rewrite_attention(kind.model, anatomy, after=Half(), name="gate")
    assert not changes(before, state(kind.model))


def test_other_models_of_the_process_are_left_alone():
    kind, other = build("llama"), build("llama")
    with torch.no_grad():
        base = other()
        with rewrite_attention(kind.model, seen("llama"), after=center):
            assert torch.equal(other(), base)


def test_tables_are_put_back_by_the_last_edit_that_needs_them():
    one, two = build("llama"), build("gpt2")
    table = ALL_ATTENTION_FUNCTIONS
    before = dict(table._local_mapping)
    a = rewrite_attention(one.model, seen("llama"), after=center)
    b = rewrite_attention(two.model, seen("gpt2"), after=center)
    a.undo()
    with torch.no_grad():
        edited = two()
        b.undo()
        assert not torch.allclose(edited, two(), atol=1e-2)
    assert table._local_mapping == before
