"""Skipping a block is the model without it; replacing the stream is what a hook would do."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, build, gpt2, llama, seen
from torch import nn

from fullrank.capture import survey
from fullrank.edit import edits_in, replace_stream, rewrite_block, skip_block
from fullrank.errors import EditError

CASES = [(name, stack) for name in KINDS for stack in build(name).lists]


def without(kind, stack: str, layer: int):
    """The same model built without one block."""
    path, _, last = kind.lists[stack].rpartition(".")
    blocks = kind.blocks(stack)
    kept = nn.ModuleList(block for index, block in enumerate(blocks) if index != layer - 1)
    setattr(kind.model.get_submodule(path), last, kept)
    if hasattr(kind.model, "num_layers"):  # nn.TransformerEncoder
        kind.model.num_layers = len(kept)
    config = getattr(kind.model, "config", None)
    if getattr(config, "layer_types", None) is not None:  # of which kind each layer is
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index != layer - 1]
    if len(kind.lists) == 1 and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(kept)
    return kind


@pytest.mark.parametrize(("name", "stack"), CASES)
@pytest.mark.parametrize("layer", [2, 3])
def test_skipping_a_block_is_the_model_without_it(name, stack, layer):
    kind = build(name)
    with torch.no_grad():
        base = kind()
        with skip_block(kind.model, seen(name), stack=stack, layer=layer):
            skipped = kind()
        twin = without(build(name), stack, layer)()
        assert torch.allclose(skipped, twin, atol=1e-10, rtol=0)
        assert not torch.allclose(skipped, base, atol=1e-3)
        assert torch.equal(kind(), base)


def test_the_first_block_can_be_skipped_though_later_ones_need_what_it_returns_beside():
    kind = build("t5")  # its position bias is made there
    skipped = []
    kind.blocks("encoder")[1].register_forward_pre_hook(lambda module, args: skipped.append(args[0].clone()))
    given = []
    kind.blocks("encoder")[0].register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    with torch.no_grad(), skip_block(kind.model, seen("t5"), stack="encoder", layer=1):
        kind()
    assert torch.equal(skipped[0], given[0])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_cache_is_filled_as_without_the_edit(make):
    kind = make()
    kind.model.eval()
    cached = dict(kind.batch, use_cache=True)
    anatomy = kind.anatomy()
    with torch.no_grad(), skip_block(kind.model, anatomy, layer=1):
        full = kind.model(**kind.batch).last_hidden_state
        first = kind.model(**dict(cached, input_ids=cached["input_ids"][:, :6]))
        assert first.past_key_values.get_seq_length() == 6
        rest = kind.model(input_ids=cached["input_ids"][:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.last_hidden_state, full[:, 6:], atol=1e-5)


def test_a_shared_block_is_skipped_by_the_number_of_its_call():
    kind = build("albert")
    anatomy = seen("albert")
    streams = []

    def keep(module, args, output):
        streams.append((args[0], output[0] if isinstance(output, tuple) else output))

    kind.blocks("encoder")[0].register_forward_hook(keep)
    with torch.no_grad():
        for layer in (1, 2, 3):
            streams.clear()
            with skip_block(kind.model, anatomy, layer=layer):
                kind()
            assert [bool(torch.equal(a, b)) for a, b in streams] == [number == layer for number in (1, 2, 3)]


def test_a_shared_block_counts_anew_after_a_forward_that_was_left_in_the_middle():
    kind = build("albert")
    fail = []

    def failing(module, args, output):
        if fail:
            raise RuntimeError("in the middle")

    with torch.no_grad(), skip_block(kind.model, seen("albert"), layer=2):
        right = kind()
        handle = kind.blocks("encoder")[0].register_forward_hook(failing)
        fail.append(True)
        with pytest.raises(RuntimeError, match="in the middle"):
            kind()
        handle.remove()
        assert torch.equal(kind(), right)


def test_a_block_that_writes_into_its_input_is_skipped_too():
    from plain import InPlaceBlock, PlainGPT, sharp, tokens

    class Writing(InPlaceBlock):
        def forward(self, x):
            x += self.attn(self.ln_1(x))
            x += self.mlp(self.ln_2(x))
            return x

    model, batch = sharp(PlainGPT(block=Writing)), tokens()
    with torch.no_grad():
        with skip_block(model, "h.1"):
            skipped = model(batch)
        del model.h[1]
        assert torch.equal(skipped, model(batch))


@pytest.mark.parametrize(("name", "stack"), CASES)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_stream_is_replaced_by_what_a_function_makes_of_it(name, stack, layer):
    kind = build(name)
    first = stack == "encoder" and name == "torch_tokens_first"
    tokens = 0 if first else 1
    blocks = kind.blocks(stack)

    def mean(state):
        return state.mean(1, keepdim=True)

    with torch.no_grad():
        with replace_stream(kind.model, seen(name), mean, stack=stack, layer=layer) as edit:
            edited = kind()
        assert not edit.in_force

        def set_mean(state):
            return state.mean(tokens, keepdim=True).expand_as(state)

        def before(module, args, kwargs):
            return (set_mean(args[0]), *args[1:]) if args else args, kwargs

        def after(module, args, output):
            return (set_mean(output[0]), *output[1:]) if isinstance(output, tuple) else set_mean(output)

        if layer == 0:
            handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = blocks[layer - 1].register_forward_hook(after)
        twin = kind()
        handle.remove()
    assert torch.allclose(edited, twin, atol=1e-12)


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_a_block_is_rewritten_from_what_it_was_given_and_what_it_returns(name, stack):
    kind = build(name)
    anatomy = seen(name)
    with torch.no_grad():
        base = kind()
        with rewrite_block(kind.model, anatomy, lambda X, Y: Y, stack=stack, layer=2):
            assert torch.equal(kind(), base)
        with rewrite_block(kind.model, anatomy, lambda X, Y: X, stack=stack, layer=2):
            passed = kind()
        with skip_block(kind.model, anatomy, stack=stack, layer=2):
            assert torch.equal(passed, kind())
        with rewrite_block(kind.model, anatomy, lambda X, Y: 0.3 * X + Y.flip(1), stack=stack, layer=2):
            edited = kind()
        tokens = 0 if name == "torch_tokens_first" else 1

        def mixed(module, args, kwargs, output):
            state = output[0] if isinstance(output, tuple) else output
            new = 0.3 * (args[0] if args else kwargs["hidden_states"]) + state.flip(tokens)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        kind.blocks(stack)[1].register_forward_hook(mixed, with_kwargs=True)
        assert torch.allclose(edited, kind(), atol=1e-12)


def test_a_module_that_rewrites_a_block_is_part_of_it():
    kind = build("gpt2")

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, 2.0]).double())

        def forward(self, before, after):
            return self.weight[0] * before + self.weight[1] * (after - before)

    mix = Mix()
    edit = rewrite_block(kind.model, seen("gpt2"), mix, layer=2, name="mix")
    assert repr(edit) == "<rewrite the block at decoder layer 2 (h.1); 2 parameters added>"
    assert kind.model.get_parameter("h.1.mix.weight") is mix.weight
    kind().sum().backward()
    assert (mix.weight.grad != 0).all()
    edit.undo()
    assert "h.1.mix.weight" not in kind.model.state_dict()
    wrong = rewrite_block(kind.model, seen("gpt2"), lambda X, Y: Y[:1], layer=2)
    with wrong, pytest.raises(EditError, match=r"after returned \(1, 9, 32\) for block h.1, not \(3, 9, 32\)"):
        kind()


def test_a_value_may_be_a_number_or_a_tensor():
    kind = build("gpt2")
    row = torch.randn(32, generator=torch.Generator().manual_seed(2)).double()
    seen_states = []
    kind.blocks("decoder")[2].register_forward_pre_hook(lambda module, args: seen_states.append(args[0].clone()))
    with torch.no_grad():
        for value in (0.5, row):
            with replace_stream(kind.model, seen("gpt2"), value, layer=2):
                kind()
    assert torch.equal(seen_states[0], torch.full((3, 9, 32), 0.5).double())
    assert torch.equal(seen_states[1], row.expand(3, 9, 32))


def test_what_is_edited_can_be_printed():
    kind = build("gpt2")
    edit = skip_block(kind.model, seen("gpt2"), layer=2)
    assert repr(edit) == "<skip the block at decoder layer 2 (h.1)>"
    assert edits_in(kind.model) == ("h.1: skip the block",)
    edit.undo()
    assert repr(edit) == "<skip the block at decoder layer 2 (h.1); undone>"
    assert edits_in(kind.model) == ()


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"layer": 4}, "layer=4, but the stack decoder has layers 1 to 3."),
        ({"layer": 1, "stack": "encoder"}, "stack='encoder' is none of this model's stacks, which are decoder."),
        ({}, "layer= is needed"),
    ],
)
def test_a_block_that_is_not_there_is_refused(where, sentence):
    kind = build("gpt2")
    with pytest.raises(EditError, match=sentence.replace(".", r"\.")):
        skip_block(kind.model, seen("gpt2"), **where)
    assert not edits_in(kind.model)


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(EditError, match=r"'h.9' is no module of this GPT2Model\."):
        skip_block(build("gpt2").model, "h.9")


def test_a_stack_must_be_named_where_there_are_two():
    with pytest.raises(EditError, match="stack= is needed: this model has encoder, decoder"):
        skip_block(build("t5").model, seen("t5"), layer=1)


def test_a_block_that_changes_the_shape_cannot_be_skipped():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    with skip_block(model, "0"), pytest.raises(EditError, match=r"called with \(2, 4\) and returns \(2, 8\)"):
        model(torch.zeros(2, 4))


def test_a_value_of_another_shape_is_refused():
    kind = build("gpt2")
    edit = replace_stream(kind.model, seen("gpt2"), torch.zeros(3), layer=1)
    with edit, pytest.raises(EditError, match=r"the stream at h.0 is \(3, 9, 32\), and the value for it is \(3,\)\."):
        kind()
    assert not edits_in(kind.model)


def test_the_fast_path_of_an_encoder_is_left_while_it_is_edited():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        base = model(states)
        with replace_stream(model, survey(model, lambda: model(states)), 0.0, layer=1):
            assert not torch.allclose(model(states), base, atol=1e-2)
        assert torch.equal(model(states), base)
    assert torch.backends.mha.get_fastpath_enabled()
