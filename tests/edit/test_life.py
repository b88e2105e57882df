"""What becomes of edits when a model is checkpointed, wrapped, saved, loaded, copied or pickled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import transformers as hf
from kinds import build, center, seen
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fullrank.edit import (
    Call,
    edits_in,
    find_branches,
    reparametrize,
    replace_weight,
    rewrite_attention,
    scale_branch,
    skip_block,
)
from fullrank.errors import EditError


class Temperature(nn.Module):
    """Queries times a learned factor per head."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, 4).double())

    def forward(self, call: Call) -> Call:
        return call.change(query=call.query * self.factor[:, None, None])


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, weight):
        return self.g * weight


def twice(weight):
    return 2 * weight


def edit_all(kind, anatomy):
    """Every kind of edit that may stay."""
    branches = find_branches(kind.model, kind, anatomy)
    name = f"{next(iter(kind.lists.values()))}.2.{next(iter(kind.mlp.values()))}.weight"
    alpha = nn.Parameter(torch.full((32,), 0.5).double())
    return [
        rewrite_attention(kind.model, anatomy, before=Temperature(), after=center, name="temperature", layer=1),
        scale_branch(kind.model, branches, by=alpha, name="alpha", layer=2, branch="mlp"),
        reparametrize(kind.model, name, Gain()),
    ]


def gradients(kind) -> dict[str, torch.Tensor]:
    kind.model.zero_grad()
    kind().square().sum().backward()
    return {name: p.grad.clone() for name, p in kind.model.named_parameters() if p.grad is not None}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-9, atol=1e-9), name


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama_eager"])
def test_checkpointing_repeats_the_edited_forward(name, reentrant):
    kind, anatomy = build(name), seen(name)
    if name == "gpt2":
        edit_all(kind, anatomy)
    else:
        rewrite_attention(kind.model, anatomy, before=lambda call: call.change(logits=2 * call.logits), after=center)
    calls = []
    rewrite_attention(kind.model, anatomy, after=lambda call, output: calls.append(call.place.layer) or output)
    plain = gradients(kind)
    assert calls == [1, 2, 3]
    calls.clear()
    kind.model.train()
    for module in kind.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in ("attn_dropout", "attention_dropout"):
        assert not getattr(kind.model.config, parameter, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name, which differs between versions
        kind.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            kind.model.enable_input_require_grads()
        assert_equal(gradients(kind), plain)
    assert calls == [1, 2, 3, 3, 2, 1]  # forward, and again in the backward pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_of_plain_code_too(reentrant):
    kind, anatomy = build("plain"), seen("plain")
    edit_all(kind, anatomy)
    plain = gradients(kind)

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    names = {f"h.{n}.block": f"h.{n}" for n in range(3)}
    for n, block in enumerate(kind.model.h):
        kind.model.h[n] = Checkpointed(block)
    found = gradients(kind)
    for new, old in names.items():
        found = {name.replace(new, old): gradient for name, gradient in found.items()}
    assert_equal(found, plain)


def test_a_shared_block_edited_by_layer_refuses_checkpointing():
    kind, anatomy = build("albert"), seen("albert")
    rewrite_attention(kind.model, anatomy, after=center, layer=2)
    group = kind.model.encoder.albert_layer_groups[0]
    forward = group.forward
    group.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with pytest.raises(EditError, match="called several times in a forward cannot be edited under activation checkp"):
        kind().sum().backward()


# ---------------------------------------------------------------- data parallelism


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_edits_before_wrapping_in_ddp_are_trained(name, one_process):
    kind, anatomy = build(name), seen(name)
    edit_all(kind, anatomy)
    plain = gradients(kind)
    inner = kind.model
    kind.model = nn.parallel.DistributedDataParallel(inner)
    wrapped = {key.removeprefix("module."): value for key, value in gradients(kind).items()}
    assert_equal(wrapped, plain)
    assert {"layers", "h"} & {key.split(".")[0] for key in wrapped}
    assert any("temperature" in key for key in wrapped) and any("alpha" in key for key in wrapped)


def test_edits_without_parameters_may_come_after_ddp_and_those_with_are_refused(one_process):
    kind, anatomy = build("gpt2"), seen("gpt2")
    kind.model = nn.parallel.DistributedDataParallel(kind.model)
    with torch.no_grad():
        base = kind()
        with skip_block(kind.model, anatomy, layer=2), rewrite_attention(kind.model, anatomy, after=center):
            assert not torch.allclose(kind(), base, atol=1e-3)
        assert torch.equal(kind(), base)
    for change in (
        lambda: rewrite_attention(kind.model, anatomy, before=Temperature()),
        lambda: reparametrize(kind.model, "h.0.attn.c_proj.weight", Gain()),
    ):
        with pytest.raises(EditError, match="inside data parallelism; edit it before it is wrapped"):
            change()
    assert not edits_in(kind.model)


# ---------------------------------------------------------------- saving and loading


def test_state_dict_holds_what_was_added_and_nothing_else_changes_its_name():
    kind, anatomy = build("gpt2"), seen("gpt2")
    names = set(kind.model.state_dict())
    edits = edit_all(kind, anatomy)
    added = {
        "h.0.attn.temperature_before.factor",
        "h.1.mlp.alpha",
        "h.2.mlp.c_proj.parametrizations.weight.original",
        "h.2.mlp.c_proj.parametrizations.weight.0.g",
    }
    assert set(kind.model.state_dict()) == names - {"h.2.mlp.c_proj.weight"} | added
    for edit in edits:
        edit.undo()
    assert set(kind.model.state_dict()) == names
    with skip_block(kind.model, anatomy, layer=2), rewrite_attention(kind.model, anatomy, after=center):
        assert set(kind.model.state_dict()) == names


def test_an_edited_model_is_loaded_into_one_that_was_edited_alike(tmp_path):
    from safetensors.torch import load_file, save_file

    kind, anatomy = build("gpt2"), seen("gpt2")
    edit_all(kind, anatomy)
    with torch.no_grad():
        kind.model.h[0].attn.temperature_before.factor.mul_(3)
        edited = kind()
        other = build("gpt2")
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.zero_()
        edit_all(other, anatomy)
        save_file(kind.model.state_dict(), tmp_path / "edited.safetensors")
        other.model.load_state_dict(load_file(tmp_path / "edited.safetensors"))
        assert torch.equal(other(), edited)
        unedited = build("gpt2")
        with pytest.raises(RuntimeError, match=r"Missing key.*h.2.mlp.c_proj.weight"):
            unedited.model.load_state_dict(kind.model.state_dict())


def test_save_pretrained_stores_weights_and_not_the_edit(tmp_path):
    kind, anatomy = build("gpt2"), seen("gpt2")
    with torch.no_grad():
        base = kind()
        with (
            skip_block(kind.model, anatomy, layer=2),
            replace_weight(kind.model, "wpe.weight", twice),
        ):
            kind.model.save_pretrained(tmp_path / "edited")
        loaded = hf.GPT2Model.from_pretrained(tmp_path / "edited", dtype=torch.float64).eval()
        assert not edits_in(loaded)
        with replace_weight(kind.model, "wpe.weight", twice):
            assert torch.equal(loaded(**kind.batch)[0], kind())  # replaced values are weights like all others
        assert torch.equal(kind(), base)


def test_from_pretrained_says_which_weights_a_plain_model_does_not_know(tmp_path):
    kind, anatomy = build("gpt2"), seen("gpt2")
    edit_all(kind, anatomy)
    kind.model.save_pretrained(tmp_path / "edited")
    _, told = hf.GPT2Model.from_pretrained(tmp_path / "edited", output_loading_info=True)
    assert "h.0.attn.temperature_before.factor" in told["unexpected_keys"]
    assert "h.2.mlp.c_proj.weight" in told["missing_keys"]  # it would be drawn anew: edit first, then load


# ---------------------------------------------------------------- copying


@pytest.mark.parametrize("name", ["gpt2", "plain", "llama_eager", "torch_encoder"])
def test_a_copy_keeps_the_edits_for_itself(name):
    kind, anatomy = build(name), seen(name)
    gc.collect()  # models of other tests
    table = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with torch.no_grad():
        base = kind()
        edit = rewrite_attention(kind.model, anatomy, after=center)
        other = copy.copy(kind)
        other.model = copy.deepcopy(kind.model)
        edited = kind()
        edit.undo()
        assert torch.equal(kind(), base)
        assert torch.equal(other(), edited)
        assert len(edits_in(other.model)) >= 3 and not edits_in(kind.model)
        for parameter in other.model.parameters():
            parameter.zero_()
        assert torch.equal(kind(), base)  # nothing of the copy runs on the weights of the original
        assert not torch.equal(other(), edited)
    del other
    gc.collect()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == table


def test_a_copy_has_parameters_of_its_own():
    kind, anatomy = build("gpt2"), seen("gpt2")
    edit_all(kind, anatomy)
    other = copy.copy(kind)
    other.model = copy.deepcopy(kind.model)
    with torch.no_grad():
        edited = kind()
        assert torch.equal(other(), edited)
        other.model.h[0].attn.temperature_before.factor.zero_()
        assert torch.equal(kind(), edited)
        assert not torch.allclose(other(), edited, atol=1e-3)


def test_a_whole_model_is_pickled_where_its_functions_can_be():
    kind, anatomy = build("gpt2"), seen("gpt2")
    branches = find_branches(kind.model, kind, anatomy)
    rewritten = rewrite_attention(kind.model, anatomy, before=Temperature(), after=center, name="t", layer=1)
    with rewritten, scale_branch(kind.model, branches, by=0.5, layer=2), torch.no_grad():
        edited = kind()
        stream = io.BytesIO()
        torch.save(kind.model, stream)
    stream.seek(0)
    kind.model = torch.load(stream, weights_only=False)
    with torch.no_grad():
        assert torch.equal(kind(), edited)
    kind = build("gpt2")
    with (
        rewrite_attention(kind.model, anatomy, after=lambda call, output: output),
        pytest.raises((pickle.PicklingError, AttributeError), match=r"lambda|local"),
    ):
        pickle.dumps(kind.model)


def test_a_parametrized_model_is_not_pickled_by_torch_itself():
    kind = build("gpt2")
    reparametrize(kind.model, "h.0.attn.c_proj.weight", Gain())
    with pytest.raises(RuntimeError, match=r"only supported through state_dict"):
        pickle.dumps(kind.model)
