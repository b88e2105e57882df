"""Which norms stand where, of any model; and modules that compute something else with their parameters in place."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kinds import build, seen
from plain import Attention, Block, PlainGPT, sharp, tokens
from torch import nn
from torch.nn import functional

from fullrank.capture import survey
from fullrank.edit import edits_in, find_branches, find_norms, replace_module, scale_branch
from fullrank.errors import EditError
from untouched import changes, everything


def norms_of(model, forward, anatomy=None):
    anatomy = survey(model, forward) if anatomy is None else anatomy
    return find_norms(model, forward, anatomy, find_branches(model, forward, anatomy))


PLACES = {
    "gpt2": ("layer", 1e-5, {("attention", "read"): "ln_1", ("mlp", "read"): "ln_2"}, "ln_f"),
    "llama": (
        "rms",
        1e-6,
        {("attention", "read"): "input_layernorm", ("mlp", "read"): "post_attention_layernorm"},
        "norm",
    ),
    "gemma2": (
        "rms",
        1e-6,
        {
            ("attention", "read"): "input_layernorm",
            ("attention", "branch"): "post_attention_layernorm",
            ("mlp", "read"): "pre_feedforward_layernorm",
            ("mlp", "branch"): "post_feedforward_layernorm",
        },
        "norm",
    ),
    "bert": (
        "layer",
        1e-12,
        {("attention", "sum"): "attention.output.LayerNorm", ("mlp", "sum"): "output.LayerNorm"},
        None,
    ),
    "t5": (
        "rms",
        1e-6,
        {
            ("attention", "read"): "layer.0.layer_norm",
            ("cross", "read"): "layer.1.layer_norm",
            ("mlp", "read"): "layer.2.layer_norm",
        },
        "decoder.final_layer_norm",
    ),
    "vit": (
        "layer",
        1e-12,
        {("attention", "read"): "layernorm_before", ("mlp", "read"): "layernorm_after"},
        "layernorm",
    ),
    "falcon": (
        "layer",
        1e-5,
        {("mlp", "read"): "input_layernorm", ("attention", "read"): "input_layernorm"},
        "ln_f",
    ),
    "torch_encoder": ("layer", 1e-5, {("attention", "sum"): "norm1", ("mlp", "sum"): "norm2"}, None),
    "torch_tokens_first": ("layer", 1e-5, {("attention", "sum"): "norm1", ("mlp", "sum"): "norm2"}, None),
    "plain": ("layer", 1e-5, {("attention", "read"): "ln_1", ("mlp", "read"): "ln_2"}, "ln_f"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_norms_of_each_kind_of_model(name):
    kind, epsilon, inside, last = PLACES[name]
    model = build(name)
    before = everything(model.model)
    norms = norms_of(model.model, model, seen(name))
    assert not changes(before, everything(model.model))
    assert not norms.notes
    stack = seen(name).stacks[-1]
    for layer, path in enumerate(stack.paths, start=1):
        wanted = {(*key, f"{path}.{inner}") for key, inner in inside.items()}
        if last is not None and layer == len(stack.paths):
            wanted.add(("", "final", last))
        found = norms.of(stack.name, layer)
        assert {(norm.branch, norm.role, norm.path) for norm in found} == wanted
        assert {(norm.kind, norm.width) for norm in found} == {(kind, 32)}
        assert all(math.isclose(norm.eps, epsilon, rel_tol=0.01) for norm in found)


def test_every_layer_of_a_shared_block():
    model = build("albert")
    norms = norms_of(model.model, model, seen("albert"))
    assert [(norm.layer, norm.branch, norm.role) for norm in norms] == [
        (layer, branch, "sum") for layer in (1, 2, 3) for branch in ("attention", "mlp")
    ]


# ---------------------------------------------------------------- norms of all sorts


class HandMade(nn.Module):
    """A layer norm from its definition, with ε beside the variance."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.linspace(0.5, 2, width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.g * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) + self.b


class Unit(nn.Module):
    """Tokens on a sphere."""

    def forward(self, x):
        return functional.normalize(x, dim=-1)


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GroupNorm(4, 32)

    def forward(self, x):
        return self.inner(x.mT).mT


class OverSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(32, eps=1e-4)

    def forward(self, x):
        return self.inner(x.mT).mT


class Saturating(nn.Module):
    """What is put in the place of a norm and is none."""

    def forward(self, x):
        return torch.tanh(0.5 * x)


SORTS = {
    "hand-made": (HandMade, "layer", 1e-3),
    "inside a sequence": (lambda: nn.Sequential(nn.LayerNorm(32, eps=1e-4), nn.Dropout(0.1)), "layer", 1e-4),
    "rms": (lambda: nn.RMSNorm(32, eps=1e-2), "rms", 1e-2),
    "on a sphere": (Unit, "rms", None),
    "groups": (Groups, "other", None),
    "over samples": (OverSamples, "batch", 1e-4),
}


@pytest.mark.parametrize("sort", SORTS)
def test_a_norm_is_told_from_what_it_computes(sort):
    make, kind, epsilon = SORTS[sort]
    model = PlainGPT(layers=2)
    for block in model.h:
        block.ln_1, block.ln_2 = make(), make()
    sharp(model)
    norms = norms_of(model, lambda: model(tokens()))
    assert not norms.notes
    assert [(norm.branch, norm.role, norm.path, norm.kind) for norm in norms.of("decoder", 1)] == [
        ("attention", "read", "h.0.ln_1", kind),
        ("mlp", "read", "h.0.ln_2", kind),
    ]
    for norm in norms.of("decoder", 1):
        assert epsilon is None or math.isclose(norm.eps, epsilon, rel_tol=0.01)


def test_what_is_put_in_the_place_of_a_norm_and_is_none_is_not_found():
    model = PlainGPT(layers=2)
    for block in model.h:
        block.ln_1 = Saturating()
    norms = norms_of(sharp(model), lambda: model(tokens()))
    assert [norm.path for norm in norms] == ["h.0.ln_2", "h.1.ln_2", "ln_f"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2"])
def test_gains_that_are_zero_hide_no_norm(name):
    kind = build(name)
    norms = norms_of(kind.model, kind, seen(name))
    with torch.no_grad():
        for path in {norm.path for norm in norms}:
            kind.model.get_submodule(path).weight.fill_(-1 if name == "gemma2" else 0)  # that one multiplies by 1 + γ
    found = norms_of(kind.model, kind, seen(name))
    if name == "gemma2":
        assert all("returns the same whatever it is given" in note for note in found.notes)
        assert len(found.notes) == 3
    else:
        assert found == norms


def test_numbers_of_branches_that_are_zero_hide_no_norm():
    kind = build("gemma2")
    norms = norms_of(kind.model, kind, seen("gemma2"))
    branches = find_branches(kind.model, kind, seen("gemma2"))
    for one in branches:
        alpha = nn.Parameter(torch.zeros(1).double())
        scale_branch(kind.model, branches, by=alpha, layer=one.layer, branch=one.name)
    assert norms_of(kind.model, kind, seen("gemma2")) == norms


def test_what_is_multiplied_by_the_number_zero_is_said_where_it_may_be_a_norm():
    kind = build("gemma2")
    anatomy = seen("gemma2")
    branches = find_branches(kind.model, kind, anatomy)
    with scale_branch(kind.model, branches, by=0.0, layer=2):
        norms = find_norms(kind.model, kind, anatomy, branches)
    assert norms.notes == (
        "the norms of block layers.1 are not known: something in it, perhaps a norm, returns the same whatever it is "
        "given, as what is multiplied by 0 does.",
    )
    plain = build("plain")
    branches = find_branches(plain.model, plain, seen("plain"))
    with scale_branch(plain.model, branches, by=0.0):
        assert not find_norms(plain.model, plain, seen("plain"), branches).notes


def test_how_often_the_module_of_a_norm_is_called():
    model = PlainGPT(layers=2)
    model.h[1].ln_2 = model.h[1].ln_1
    norms = norms_of(sharp(model), lambda: model(tokens()))
    assert [(norm.path, norm.calls) for norm in norms] == [
        ("h.0.ln_1", 1),
        ("h.0.ln_2", 1),
        ("h.1.ln_1", 2),
        ("h.1.ln_1", 2),
        ("ln_f", 1),
    ]
    falcon = build("falcon")
    assert {norm.calls for norm in norms_of(falcon.model, falcon)} == {1}  # one for both branches, called once


class WrittenOut(Block):
    """Norms as functions and as formulas, in places of their own."""

    def forward(self, x):
        x = x + functional.layer_norm(self.attn(x), (32,), eps=1e-4)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return functional.layer_norm(x + self.mlp(y), (32,), self.ln_1.weight)


def test_norms_that_are_no_modules_have_no_path():
    model = sharp(PlainGPT(layers=2, block=WrittenOut))
    norms = norms_of(model, lambda: model(tokens()))
    assert [(n.branch, n.role, n.path, n.kind) for n in norms.of("decoder", 1)] == [
        ("attention", "branch", "", "layer"),
        ("mlp", "read", "", "rms"),
        ("mlp", "sum", "", "layer"),
    ]
    assert [round(math.log10(n.eps)) for n in norms.of("decoder", 1)] == [-4, -3, -5]


class Everywhere(nn.Module):
    """Norms of queries and keys, of the branch, and around parallel branches."""

    def __init__(self, width: int, heads: int, **options: bool) -> None:
        super().__init__()
        self.one, self.two, self.three, self.inner = (nn.LayerNorm(width) for _ in range(4))
        self.attn = Attention(width, heads, **options)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(self.up, self.inner, nn.GELU(), self.down)

    def forward(self, x):
        return x + self.three(self.attn(self.one(x))) + self.mlp(self.two(x))


def test_parallel_branches_and_norms_inside_them():
    model = sharp(PlainGPT(layers=2, block=Everywhere))
    norms = norms_of(model, lambda: model(tokens()))
    assert {(n.branch, n.role, n.path) for n in norms.of("decoder", 1)} == {
        ("attention", "read", "h.0.one"),
        ("attention", "branch", "h.0.three"),
        ("mlp", "read", "h.0.two"),
    }


def test_in_half_precision_too():
    model = sharp(PlainGPT(layers=2)).bfloat16()
    norms = norms_of(model, lambda: model(tokens()))
    assert [norm.kind for norm in norms] == ["layer"] * 5
    assert all(math.isclose(norm.eps, 1e-5, rel_tol=0.1) for norm in norms)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return x + functional.linear(functional.layer_norm(x, (32,)), self.weight)


def test_blocks_whose_branches_are_not_known_are_said():
    model = nn.Sequential(Bare(), Bare())
    x = torch.randn(2, 5, 32)
    norms = norms_of(model, lambda: model(x))
    assert norms.found == ()
    assert norms.notes[0] == "the norms of block 0 are not known: its branches were not found."


# ---------------------------------------------------------------- replacing what a module computes


def test_without_its_norm_a_pre_norm_block_is_the_block_by_hand():
    kind = build("plain")
    path = next(n.path for n in norms_of(kind.model, kind, seen("plain")).of("decoder", 2) if n.branch == "mlp")
    names = list(kind.model.state_dict())
    with torch.no_grad():
        base = kind()
        with replace_module(kind.model, path, lambda run, x: x) as edit:
            edited = kind()
            assert list(kind.model.state_dict()) == names
            assert edits_in(kind.model) == ("h.1.ln_2: replace what the module computes",)
        assert repr(edit) == "<replace what the module computes at h.1.ln_2; undone>"
        assert torch.equal(kind(), base)
        block = kind.model.h[1]

        def by_hand(x):
            x = x + block.attn(block.ln_1(x))
            return x + block.mlp(x)

        block.forward = by_hand
        assert torch.allclose(edited, kind(), atol=1e-12)
        assert not torch.allclose(edited, base, atol=1e-3)


class Rescaled(nn.Module):
    """What the norm returns, times a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, run, x):
        return self.factor * run(x)


@pytest.mark.parametrize("name", ["gpt2", "bert", "torch_encoder", "vit"])
def test_a_module_instead_becomes_a_child(name):
    kind = build(name)
    before = everything(kind.model)
    norm = norms_of(kind.model, kind, seen(name)).found[0]
    with torch.no_grad():
        base = kind()
        edit = replace_module(kind.model, norm.path, Rescaled(), name="rescaled")
        assert f"{norm.path}.rescaled.factor" in kind.model.state_dict()
        assert edit.parameters == 1
        edited = kind()
        other = copy.copy(kind)
        other.model = copy.deepcopy(kind.model)
        assert torch.equal(other(), edited)
    kind().square().sum().backward()
    module = kind.model.get_submodule(norm.path)
    assert module.rescaled.factor.grad.abs() > 0
    kind.model.zero_grad()
    edit.undo()
    assert not changes(before, everything(kind.model))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
        assert torch.allclose(edited, kind(), atol=1e-10)
        assert not torch.allclose(edited, base, atol=1e-4)


def test_a_replaced_module_in_a_graph():
    torch._dynamo.reset()
    kind = build("plain")
    compiled = torch.compile(kind.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        base = compiled(**kind.batch)
        with replace_module(kind.model, "h.0.ln_1", Rescaled()):
            assert torch.allclose(compiled(**kind.batch), kind(), atol=1e-10)
            assert not torch.allclose(kind(), base, atol=1e-4)
        assert torch.allclose(compiled(**kind.batch), base, atol=1e-10)
    torch._dynamo.reset()


def test_what_cannot_be_replaced_is_refused():
    kind = build("gpt2")
    before = everything(kind.model)
    with pytest.raises(EditError, match=r"'h\.9\.ln' is no module of this GPT2Model"):
        replace_module(kind.model, "h.9.ln", lambda run, x: x)
    with pytest.raises(EditError, match="name='weight' is taken in a LayerNorm"):
        replace_module(kind.model, "ln_f", Rescaled(), name="weight")
    assert not changes(before, everything(kind.model))
