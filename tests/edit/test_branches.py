"""Scaling a branch: by 0 it is as if its last weights were 0; by a tensor as if their rows were scaled."""

from __future__ import annotations

import plain
import pytest
import torch
import transformers as hf
from kinds import KINDS, TEXT, build, ids, seen
from torch import Tensor, nn

from fullrank.capture import survey
from fullrank.edit import edits_in, find_branches, scale_branch
from fullrank.errors import EditError

CASES = [(name, stack, branch) for name in KINDS for stack in build(name).lists for branch in ("attention", "mlp")]


def last_map(kind, stack: str, branch: str, layer: int) -> tuple[nn.Module, list[Tensor]]:
    """The module whose weights end a branch, or the norm after it, and those weights (features last)."""
    block = kind.blocks(stack)[layer - 1]
    after = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[branch]
    if hasattr(block, after) and hasattr(block, "post_feedforward_layernorm"):
        norm = getattr(block, after)  # (1 + weight) · x
        return norm, [norm.weight]
    module = block.get_submodule((kind.attention if branch == "attention" else kind.mlp)[stack])
    features_last = type(module).__name__ == "Conv1D"
    weights = [module.weight if features_last else module.weight.T]
    return module, weights + ([module.bias] if getattr(module, "bias", None) is not None else [])


@pytest.mark.parametrize(("name", "stack", "branch"), CASES)
def test_a_branch_scaled_by_a_tensor_is_one_whose_last_weights_are_scaled(name, stack, branch):
    kind = build(name)
    branches = find_branches(kind.model, kind, seen(name))
    assert not branches.notes
    factors = torch.linspace(-1, 2, 32).double()
    with torch.no_grad():
        base = kind()
        edited = {}
        for by in (0.0, factors):
            with scale_branch(kind.model, branches, by=by, stack=stack, layer=2, branch=branch) as edit:
                edited[by] = kind()
            assert not edit.in_force
        assert torch.equal(kind(), base)
        for by, found in edited.items():
            module, weights = last_map(kind, stack, branch, 2)
            kept = [weight.clone() for weight in weights]
            for weight in weights:
                if "Norm" in type(module).__name__:
                    weight.copy_((1 + weight) * by - 1)
                else:
                    weight.mul_(by)
            assert torch.allclose(found, kind(), atol=1e-5 if name == "gemma2" else 1e-10)  # its norms are in float32
            assert not torch.allclose(found, base, atol=1e-3)
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def test_cross_attention_is_a_branch_of_its_own():
    kind = build("t5")
    branches = find_branches(kind.model, kind, seen("t5"))
    assert list(branches.of("decoder", 2)) == ["attention", "cross", "mlp"]
    with torch.no_grad():
        with scale_branch(kind.model, branches, by=0.0, branch="cross"):
            edited = kind()
        for block in kind.model.decoder.block:
            block.layer[1].EncDecAttention.o.weight.zero_()
        assert torch.allclose(edited, kind(), atol=1e-12)


def test_a_shared_block_is_scaled_by_layer():
    kind = build("albert")
    branches = find_branches(kind.model, kind, seen("albert"))
    outputs = []
    kind.model.get_submodule(branches.found[0].path).register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad(), scale_branch(kind.model, branches, by=0.0, layer=2, branch="attention"):
        kind()
    assert [bool((output == 0).all()) for output in outputs] == [False, True, False]


def test_a_parameter_becomes_part_of_the_model():
    kind = build("llama")
    branches = find_branches(kind.model, kind, seen("llama"))
    names = [name for name, _ in kind.model.named_parameters()]
    alpha = nn.Parameter(torch.ones(32).double())
    base = kind()
    edit = scale_branch(kind.model, branches, by=alpha, layer=1, branch="attention", name="alpha")
    assert repr(edit).endswith("decoder layer 1 attention (layers.0.self_attn); 32 parameters added>")
    assert dict(kind.model.named_parameters())["layers.0.self_attn.alpha"] is alpha
    assert torch.equal(kind(), base)
    kind().sum().backward()
    assert alpha.grad is not None and alpha.grad.abs().sum() > 0
    edit.undo()
    assert [name for name, _ in kind.model.named_parameters()] == names


def test_a_module_may_take_the_place_of_the_factor():
    kind = build("plain")
    branches = find_branches(kind.model, kind, seen("plain"))
    with torch.no_grad():
        with scale_branch(kind.model, branches, by=lambda added: -added):
            edited = kind()
        with scale_branch(kind.model, branches, by=-1):
            assert torch.equal(edited, kind())
        inner = nn.Linear(32, 32).double()
        with scale_branch(kind.model, branches, by=inner, layer=1, branch="mlp"):
            assert inner in set(kind.model.modules())
            kind()
        assert inner not in set(kind.model.modules())


class Inline(nn.Module):
    """A block whose MLP is code."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x + torch.nn.functional.linear(x, self.weight)


def test_what_no_module_returns_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(Inline() for _ in range(3))

        def forward(self, x):
            for block in self.h:
                x = block(x)
            return x

    model = Net()
    states = torch.randn(2, 5, 8)
    anatomy = survey(model, lambda: model(states))
    branches = find_branches(model, lambda: model(states), anatomy)
    assert branches.found == ()
    with pytest.raises(EditError, match=r"no branch was found at layer=1; what block h.0 adds to its stream is not"):
        scale_branch(model, branches, by=0.0, layer=1)


def test_a_branch_that_is_not_there_is_refused():
    kind = build("gpt2")
    branches = find_branches(kind.model, kind, seen("gpt2"))
    with pytest.raises(EditError, match="no branch was found at name='cross'; the branches found are: decoder 1 att"):
        scale_branch(kind.model, branches, by=0.0, branch="cross")
    edit = scale_branch(kind.model, branches, by=torch.ones(2, 2, 2, 2))
    with edit, pytest.raises(EditError, match=r"what h.0.attn adds is \(3, 9, 32\), and by= is \(2, 2, 2, 2\)"):
        kind()
    kind.model.h[0].attn.scale = 1.0
    with pytest.raises(EditError, match="name='scale' is taken in a GPT2Attention; choose another name="):
        scale_branch(kind.model, branches, by=nn.Parameter(torch.ones(32)))
    assert not edits_in(kind.model)


def test_a_sequence_does_not_run_what_it_is_given_to_hold():
    kind = build("plain")
    by = nn.Linear(32, 32, bias=False).double()
    with torch.no_grad():
        by.weight.copy_(0.5 * torch.eye(32))
        with scale_branch(kind.model, find_branches(kind.model, kind, seen("plain")), by=0.5, layer=1, branch="mlp"):
            expected = kind()
        with scale_branch(kind.model, find_branches(kind.model, kind, seen("plain")), by=by, layer=1, branch="mlp"):
            assert isinstance(kind.model.h[0].mlp, nn.Sequential)
            assert any(parameter is by.weight for parameter in kind.model.parameters())
            assert torch.allclose(kind(), expected, atol=1e-12)
        assert len(kind.model.h[0].mlp) == 3


def drawn(model, **batch):
    """A model of sharp attention with what it is called with, its anatomy and its branches."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.double().eval()
    run = lambda: model(**batch)[0]  # noqa: E731
    return model, run, find_branches(model, run, survey(model, run))


def test_attention_behind_a_dropout_of_its_own_is_called_so_where_branches_are_summed_first():
    config = hf.GPTNeoXConfig(**TEXT, use_parallel_residual=True)
    model, run, branches = drawn(hf.GPTNeoXModel(config), input_ids=ids(), use_cache=False)
    assert sorted(branches.of("decoder", 2)) == ["attention", "mlp"]
    for name, last in (("attention", "attention.dense"), ("mlp", "mlp.dense_4h_to_h")):
        with torch.no_grad():
            with scale_branch(model, branches, by=0.0, layer=2, branch=name):
                found = run()
            module = model.layers[1].get_submodule(last)
            kept = [module.weight.clone(), module.bias.clone()]
            module.weight.zero_()
            module.bias.zero_()
            assert torch.allclose(found, run(), atol=1e-12)
            module.weight.copy_(kept[0])
            module.bias.copy_(kept[1])
            assert not torch.allclose(found, run(), atol=1e-3)


def test_branches_that_share_their_last_module_are_found_before_it():
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    config = hf.BeitConfig(**sizes, image_size=16, patch_size=4, drop_path_rate=0.0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    model, run, branches = drawn(hf.BeitModel(config), pixel_values=images)
    assert not branches.notes
    assert [branch.path for branch in branches.of("vision", 2).values()] == ["layers.1.attention", "layers.1.mlp"]
    factors = torch.linspace(-1, 2, 32).double()
    for name, scale in (("attention", "lambda_1"), ("mlp", "lambda_2")):
        with torch.no_grad():
            with scale_branch(model, branches, by=factors, layer=2, branch=name):
                found = run()
            parameter = getattr(model.layers[1], scale)
            kept = parameter.clone()
            parameter.mul_(factors)
            assert torch.allclose(found, run(), atol=1e-12)
            parameter.copy_(kept)
            assert not torch.allclose(found, run(), atol=1e-4)


class SharedNorm(nn.Module):
    """One norm behind both branches."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.behind = plain.Attention(32, 4, fused=True), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        x = x + self.behind(self.attn(x))
        return x + self.behind(self.mlp(x))


def test_what_stands_before_a_norm_that_branches_share_is_no_branch():
    model = plain.PlainGPT(layers=2)
    model.h = nn.ModuleList(SharedNorm() for _ in range(2))
    model.double().eval()
    run = lambda: model(plain.tokens())  # noqa: E731
    branches = find_branches(model, run, survey(model, run))
    assert branches.found == ()
    assert len(branches.notes) == 2
    with pytest.raises(EditError, match=r"at any place; what block h\.0 adds to its stream is") as caught:
        branches.chosen(None, None, None)
    assert str(caught.value).endswith("or was not followed, and so for 1 more.")
    assert "h.1" not in str(caught.value)
