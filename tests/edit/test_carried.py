"""What layers share within a forward: gradients with and without repeated blocks, copies, compilers, memory."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from kinds import build, seen
from plain import PlainGPT, sharp, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fullrank.capture import survey
from fullrank.edit import Carried, carry, edits_in, find_branches, rewrite_attention, rewrite_residual, together
from fullrank.errors import EditError
from untouched import changes, everything


class FirstValues:
    """Values of the first layer, mixed into those of later ones (value residual)."""

    def __init__(self, carried: Carried) -> None:
        self.carried = carried

    def __call__(self, call):
        if call.place.layer == 1:
            self.carried.put(call.place.stack, (call.value, call.place.path))
            return call
        first, path = self.carried.get(call.place.stack)
        assert path != call.place.path
        return call.change(value=0.5 * call.value + 0.5 * first)


def sharing(model, anatomy):
    carried = Carried()
    return carried, together([carry(model, carried), rewrite_attention(model, anatomy, before=FirstValues(carried))])


def gradients(run, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = run()
    probe = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    (output * probe).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-9, atol=1e-9), name


def with_first_values_by_hand(model, ids, *, detached: bool = False):
    """PlainGPT from its definition, with the first layer's values in later ones."""
    x = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
    first = None
    for block in model.h:
        own = block.attn
        q, k, v = (y.unflatten(2, (own.heads, -1)).transpose(1, 2) for y in own.c_attn(block.ln_1(x)).chunk(3, dim=-1))
        if first is None:
            first = v.detach() if detached else v
        else:
            v = 0.5 * v + 0.5 * first
        s = q @ k.mT / q.shape[-1] ** 0.5
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        x = x + own.c_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.head(model.ln_f(x))


def plain(layers: int = 3):
    model = sharp(PlainGPT(layers=layers)).double()
    return model, survey(model, lambda: model(tokens()))


# ---------------------------------------------------------------- what it computes


def test_layers_share_what_the_first_one_put_down():
    model, anatomy = plain()
    before = everything(model)
    base = model(tokens())
    _, edit = sharing(model, anatomy)
    found = gradients(lambda: model(tokens()), model)
    with torch.no_grad():
        assert torch.allclose(model(tokens()), with_first_values_by_hand(model, tokens()), atol=1e-12)
    twin = gradients(lambda: with_first_values_by_hand(model, tokens()), model)
    assert_equal(found, twin)
    cut = gradients(lambda: with_first_values_by_hand(model, tokens(), detached=True), model)
    assert not torch.allclose(cut["h.0.attn.c_attn.weight"], twin["h.0.attn.c_attn.weight"], atol=1e-3)
    assert "PlainGPT: carry between layers" in edits_in(model)
    edit.undo()
    model.zero_grad()
    assert not changes(before, everything(model))
    assert torch.equal(model(tokens()), base)


def test_nothing_is_kept_when_the_forward_is_over():
    model, anatomy = plain()
    carried, _ = sharing(model, anatomy)
    held = []
    put = carried.put

    def watched(key, value):
        held.append(weakref.ref(value[0]))
        put(key, value)

    carried.put = watched
    with torch.no_grad():
        model(tokens())
    gc.collect()
    assert len(held) == 1 and held[0]() is None
    with pytest.raises(EditError, match="nothing was carried under 'decoder' in this forward"):
        carried.get("decoder")
    output = model(tokens())
    del output
    gc.collect()
    assert held[1]() is None


def test_a_forward_that_breaks_off_leaves_nothing_to_the_next():
    model, anatomy = plain()
    carried, _ = sharing(model, anatomy)
    handle = model.h[2].register_forward_pre_hook(lambda *ignored: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    handle.remove()
    with pytest.raises(EditError, match="nothing was carried under 'decoder'"):
        carried.get("decoder")
    assert torch.allclose(model(tokens()), with_first_values_by_hand(model, tokens()), atol=1e-12)


def test_a_copy_has_its_own():
    model, anatomy = plain()
    carried, edit = sharing(model, anatomy)
    other = copy.deepcopy(model)
    edit.undo()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.allclose(other(tokens()), with_first_values_by_hand(other, tokens()), atol=1e-12)
        theirs = next(around for around in other.h[1].attn.forward.arounds).before.carried
        assert theirs is not carried
        assert other.forward.arounds[0]._carried is theirs
        again = pickle.loads(pickle.dumps(other))
        assert torch.equal(again(tokens()), other(tokens()))


# ---------------------------------------------------------------- activation checkpointing


def checkpointed(model, **options):
    for block in model.h:
        block.forward = functools.partial(checkpoint, block.forward, **options)


def test_repeated_blocks_give_the_gradients_of_blocks_that_are_not():
    model, anatomy = plain()
    _, _ = sharing(model, anatomy)
    wanted = gradients(lambda: model(tokens()), model)
    checkpointed(model, use_reentrant=False)
    assert_equal(gradients(lambda: model(tokens()), model), wanted)


def test_of_several_forwards_before_one_backward_pass_each_finds_its_own():
    model, anatomy = plain()
    _, _ = sharing(model, anatomy)
    other = (tokens() + 7) % 50

    def both():
        return torch.cat([model(tokens()), 3 * model(other)])

    wanted = gradients(both, model)
    checkpointed(model, use_reentrant=False)
    assert_equal(gradients(both, model), wanted)


def test_graphs_that_nobody_runs_backward_are_freed_with_what_they_carry():
    model, anatomy = plain()
    carried, _ = sharing(model, anatomy)
    checkpointed(model, use_reentrant=False)
    output = model(tokens())
    assert len(carried._regions) == 3
    del output
    gc.collect()
    assert len(carried._regions) == 0
    loss = model(tokens()).sum()
    loss.backward()
    del loss
    gc.collect()
    assert len(carried._regions) == 0


def test_a_whole_forward_that_is_repeated_carries_anew():
    model, anatomy = plain()
    _, _ = sharing(model, anatomy)
    wanted = gradients(lambda: model(tokens()), model)
    for reentrant in (False, True):
        found = gradients(lambda: checkpoint(_called, model, _one(), use_reentrant=reentrant), model)  # noqa: B023
        assert_equal(found, wanted)


def _one():
    return torch.ones((), requires_grad=True)


def _called(model, one):
    return model(tokens()) * one.to(torch.float64)


def test_reentrant_checkpointing_is_refused_and_gives_no_gradients():
    model, anatomy = plain()
    _, _ = sharing(model, anatomy)
    checkpointed(model, use_reentrant=True)
    model.zero_grad()
    with pytest.raises(EditError, match="cannot be carried through activation checkpointing with reentrance"):
        model(tokens()).sum().backward()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_of_transformers(name):
    kind, anatomy = build(name), seen(name)
    _, _ = sharing(kind.model, anatomy)
    wanted = gradients(kind, kind.model)
    kind.model.train()
    for module in kind.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_equal(gradients(kind, kind.model), wanted)
        kind.model.gradient_checkpointing_enable({"use_reentrant": True})
        kind.model.enable_input_require_grads()
        with pytest.raises(EditError, match="cannot be carried through activation checkpointing with reentrance"):
            gradients(kind, kind.model)


# ---------------------------------------------------------------- compilers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layers", [2])
def test_two_layers_share_in_one_graph(layers):
    torch._dynamo.reset()
    model, anatomy = plain(layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        base = compiled(tokens())
    carried, edit = sharing(model, anatomy)
    wanted = gradients(lambda: model(tokens()), model)
    assert_equal(gradients(lambda: compiled(tokens()), model), wanted)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(tokens()), model(tokens()), atol=1e-12)
        with pytest.raises(EditError, match="nothing was carried"):
            carried.get("decoder")
        edit.undo()
        assert torch.allclose(compiled(tokens()), base, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_share_too():
    torch._dynamo.reset()
    model, anatomy = plain(2)
    _, _ = sharing(model, anatomy)
    with torch.no_grad():
        wanted = model(tokens())
        for block in model.h:
            block.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.allclose(model(tokens()), wanted, atol=1e-12)
    torch._dynamo.reset()


class Repeating(PlainGPT):
    """Checkpoints its blocks itself, where a compiler sees it."""

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.ln_f(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_repeated_regions_inside_one_graph_need_a_switch_of_the_compiler(monkeypatch):
    model, anatomy = plain(2)
    repeating = copy.deepcopy(model)
    repeating.__class__ = Repeating
    gradients_of = []
    for each in (model, repeating):
        sharing(each, anatomy)
        branches = find_branches(each, lambda each=each: each(tokens()), anatomy)
        rewrite_residual(each, anatomy, branches, lambda X, F: 0.8 * X + torch.tanh(F))
    wanted = gradients(lambda: model(tokens()), model)
    for allowed in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", allowed)
        compiled = torch.compile(repeating, backend="aot_eager", fullgraph=True)
        if allowed:
            gradients_of.append(gradients(lambda: compiled(tokens()), repeating))  # noqa: B023
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="Unsafe side effect"):
                compiled(tokens())
    assert_equal(gradients_of[0], wanted)
    torch._dynamo.reset()
