"""Blocks are the repeated modules that hand the stream on to each other, whatever they are called."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import ENDS, TEXT, build, floats, ids
from plain import Attention, Block, PlainGPT, PreNorm, SoftmaxAttention, sharp, states, tokens
from seen import Keep, record
from torch import nn

from fullrank.capture import Recorder, survey
from fullrank.errors import ModelError


def anatomy_of(model, *args, blocks=None, **kwargs):
    with torch.no_grad():
        return survey(model.eval(), lambda: model(*args, **kwargs), blocks=blocks)


def test_a_plain_sequence_of_embedding_blocks_norm_and_head():
    model = nn.Sequential(
        nn.Embedding(50, 32), Block(32, 4, fused=True), Block(32, 4, fused=True), nn.LayerNorm(32), nn.Linear(32, 50)
    )
    (stack,) = anatomy_of(model, tokens()).stacks
    assert (stack.name, stack.paths) == ("decoder", ("1", "2"))


def test_one_layer_is_enough():
    (stack,) = anatomy_of(PlainGPT(layers=1), tokens()).stacks
    assert stack.paths == ("h.0",)


def test_a_shared_block_called_four_times_is_four_layers():
    class Shared(PlainGPT):
        def forward(self, ids):
            x = self.wte(ids)
            for _ in range(2):
                for block in self.h:
                    x = block(x)
            return x

    model = sharp(Shared(layers=2))
    keep, recorder, _ = record(model, lambda: model(tokens()))
    assert recorder.anatomy.stacks[0].paths == ("h.0", "h.1", "h.0", "h.1")
    assert [call.layer for call in keep.calls] == [1, 2, 3, 4]
    assert list(keep.states()) == [0, 1, 2, 3, 4]


def test_blocks_inside_stages_are_found_across_stages():
    class Stage(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = nn.ModuleList(Block(32, 4, fused=True, causal=False) for _ in range(depth))
            self.down = nn.Linear(32, 32)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.down(x)[:, ::2]

    model = nn.Sequential(Stage(2), Stage(3))
    (stack,) = anatomy_of(model, states()).stacks
    assert stack.paths == ("0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1", "1.blocks.2")


def test_attention_modules_in_a_list_inside_a_block_are_no_blocks():
    class TwoAttentions(nn.Module):
        def __init__(self):
            super().__init__()
            self.attentions = nn.ModuleList(Attention(32, 4, fused=True) for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
            self.mlp = nn.Linear(32, 32)

        def forward(self, x):
            for norm, attention in zip(self.norms, self.attentions, strict=True):
                x = x + attention(norm(x))
            return x + self.mlp(x)

    model = nn.Sequential(TwoAttentions(), TwoAttentions())
    (stack,) = anatomy_of(model, states()).stacks
    assert stack.paths == ("0", "1")
    assert stack.calls == (("self", "self.1"),) * 2


def test_a_path_or_a_pattern_names_the_blocks():
    model = PlainGPT()
    assert anatomy_of(model, tokens(), blocks="h").stacks[0].paths == ("h.0", "h.1", "h.2")
    assert anatomy_of(model, tokens(), blocks="h.[12]").stacks[0].paths == ("h.1", "h.2")


def test_blocks_that_hang_on_attributes_can_be_named():
    class Attributes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_1, self.layer_2 = Block(32, 4, fused=True), Block(32, 4, fused=True)

        def forward(self, x):
            return self.layer_2(self.layer_1(x))

    model = Attributes()
    with pytest.raises(ModelError, match=r"no repeated blocks .* blocks='transformer\.h'"):
        anatomy_of(model, states())
    (stack,) = anatomy_of(model, states(), blocks="layer_*").stacks
    assert stack.paths == ("layer_1", "layer_2")


def test_naming_several_stacks():
    case = build("t5")
    anatomy = survey(case.model, case.run, blocks="encoder.block, decoder.block")
    assert {stack.name: list(stack.paths) for stack in anatomy.stacks} == case.blocks


@pytest.mark.parametrize("blocks", ["transformer.h", "nothing*"])
def test_names_that_match_nothing_are_answered_with_the_lists_there_are(blocks):
    with pytest.raises(ModelError, match="matches no module of this PlainGPT; its lists are: h"):
        anatomy_of(PlainGPT(), tokens(), blocks=blocks)


def test_blocks_that_are_never_called():
    model = PlainGPT()
    model.unused = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="no forward calls"):
        anatomy_of(model, tokens(), blocks="unused")


def test_a_model_without_blocks():
    with pytest.raises(ModelError, match="name the list that holds them"):
        anatomy_of(nn.Linear(32, 32), states())


def test_mamba_has_no_token_attention():
    model = hf.MambaModel(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4)).eval()
    keep, recorder, _ = record(model, lambda: model(ids(), use_cache=False))
    assert recorder.anatomy.stacks[0].paths == ("layers.0", "layers.1")
    assert (recorder.anatomy.stacks[0].name, recorder.anatomy.stacks[0].heads) == ("backbone", None)
    assert any("no token attention" in note for note in recorder.notes)
    assert list(keep.states()) == [0, 1, 2]
    assert not keep.calls


def test_longformer_says_that_its_band_is_not_reported():
    config = hf.LongformerConfig(**TEXT, attention_window=4, max_position_embeddings=32, pad_token_id=0)
    model = hf.LongformerModel(config).eval()
    keep, recorder, _ = record(model, lambda: model(ids(2, 8)))
    assert not keep.calls
    assert any("softmax in the blocks of encoder" in note for note in recorder.notes)


def test_attention_outside_of_the_blocks_is_left_out_and_said():
    image = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
    config = hf.SiglipConfig(text_config=TEXT | {"max_position_embeddings": 16}, vision_config=image)
    model = hf.SiglipModel(config).eval()
    batch = {"input_ids": ids(2), "pixel_values": floats(2, 3, 16, 16)}
    keep, recorder, _ = record(model, lambda: model(**batch))
    assert [stack.name for stack in recorder.anatomy.stacks] == ["vision", "encoder"]
    assert len(keep.calls) == 4
    assert any("outside of the blocks" in note for note in recorder.notes)


def test_two_calls_of_a_kernel_in_one_layer():
    config = hf.DiffLlamaConfig(**TEXT, num_key_value_heads=2)
    model = hf.DiffLlamaModel(config).eval()
    keep, recorder, _ = record(model, lambda: model(ids(), use_cache=False))
    assert recorder.anatomy.stacks[0].calls == (("self", "self.1"),) * 2
    assert [(call.layer, call.part) for call in keep.calls] == [(1, "self"), (1, "self.1"), (2, "self"), (2, "self.1")]


def test_layers_count_from_one_in_every_forward():
    model = sharp(PlainGPT())
    anatomy = anatomy_of(model, tokens())
    told = []
    keep = Keep()
    with Recorder(model, [keep], anatomy=anatomy, progress=lambda *where: told.append(where)):
        for _ in range(2):
            model(tokens())
    assert [call.layer for call in keep.calls] == [1, 2, 3, 1, 2, 3]
    assert told == [("decoder", layer, 3) for layer in (1, 2, 3)] * 2


def test_without_an_anatomy_the_first_forward_is_surveyed():
    model = sharp(PlainGPT()).train()
    torch.manual_seed(0)
    plain = model(tokens())
    keep = Keep()
    torch.manual_seed(0)
    with Recorder(model, [keep]) as recorder:
        with pytest.raises(ModelError, match="not known yet"):
            _ = recorder.anatomy
        first = model(tokens())
        model(tokens())
    assert torch.equal(plain, first)
    assert model.training
    assert recorder.anatomy.stacks[0].paths == ("h.0", "h.1", "h.2")
    assert [call.layer for call in keep.calls] == [1, 2, 3, 1, 2, 3]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_an_anatomy_of_another_model_is_refused():
    anatomy = anatomy_of(PlainGPT(layers=3), tokens())
    model = PlainGPT(layers=2)
    with pytest.raises(ModelError, match=r"anatomy names 'h\.2'"), Recorder(model, [], anatomy=anatomy):
        pass
    assert torch.backends.mha.get_fastpath_enabled()


def test_generation_counts_the_layers_of_every_step():
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, **ENDS)
    model = hf.GPT2LMHeadModel(config).eval()
    anatomy = anatomy_of(model, ids(1, 5))
    plain = model.generate(ids(1, 5), max_new_tokens=3, do_sample=False, eos_token_id=None)
    keep = Keep()
    with Recorder(model, [keep], anatomy=anatomy):
        seen = model.generate(ids(1, 5), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(plain, seen)
    assert [call.layer for call in keep.calls] == [1, 2] * 3
    assert [call.attention.shape[2:] for call in keep.calls[::2]] == [(5, 5), (1, 6), (1, 7)]


def test_channel_attention_beside_token_attention():
    model = nn.Sequential(*(PreNorm(SoftmaxAttention(way)) for way in ("channels", "module", "channels")))
    keep, recorder, _ = record(sharp(model), lambda: model(states()))
    assert [(call.layer, call.attention.shape) for call in keep.calls] == [(2, (3, 4, 9, 9))]
    assert any("not attention over tokens" in note for note in recorder.notes)


def test_lists_of_lists_are_one_stack():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.ModuleList(Block(32, 4, fused=True, causal=False) for _ in range(depth)) for depth in (1, 2)
            )

        def forward(self, x):
            for stage in self.stages:
                for block in stage:
                    x = block(x)
            return x

    (stack,) = anatomy_of(Nested(), states()).stacks
    assert (stack.name, stack.paths) == ("encoder", ("stages.0.0", "stages.1.0", "stages.1.1"))


def test_sublayers_in_lists_side_by_side_are_not_taken_for_blocks():
    class Sublayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.attentions = nn.ModuleList(Attention(32, 4, fused=True) for _ in range(2))
            self.mlps = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x):
            for attention, mlp in zip(self.attentions, self.mlps, strict=True):
                x = x + attention(x)
                x = x + mlp(x)
            return x

    with pytest.raises(ModelError, match="no repeated blocks"):
        anatomy_of(Sublayers(), states())


class GridBlock(nn.Module):
    """Window attention on a grid of tokens, (sequences, rows, columns, width), as in timm's Swin."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(32), Attention(32, 4, fused=True, causal=False)
        self.norm2, self.mlp = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        sequences, rows, columns, width = x.shape
        y = self.norm1(x).view(sequences, rows // 2, 2, columns // 2, 2, width).transpose(2, 3)
        y = self.attention(y.reshape(-1, 4, width))
        y = y.view(sequences, rows // 2, columns // 2, 2, 2, width).transpose(2, 3)
        x = x + y.reshape(x.shape)
        return x + self.mlp(self.norm2(x))


def test_a_grid_of_tokens_is_a_sequence_of_tokens():
    model = sharp(nn.Sequential(GridBlock(), GridBlock()))
    x = torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    keep, recorder, _ = record(model, lambda: model(x))
    assert recorder.anatomy.stacks[0].layout.axes == "channels last"
    assert torch.equal(keep.states()[0], x.flatten(1, 2))
    assert torch.equal(keep.states()[2], model(x).flatten(1, 2))
    assert set(keep.states("stream", "mid")) == {1, 2}
    assert [call.attention.shape for call in keep.calls] == [(12, 4, 4, 4)] * 2


def test_channels_first_without_attention_is_not_taken_for_tokens():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))).eval()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    keep, recorder, _ = record(model, lambda: model(x))
    assert recorder.anatomy.stacks[0].over == "samples"
    assert torch.equal(keep.states()[0], x.flatten(1).unsqueeze(0))


class AmbiguousBlock(GridBlock):
    """As many channels as columns: nothing tells (sequences, rows, columns, width) from (sequences, width, …)."""

    def forward(self, x):
        return x + self.attention(x.flatten(1, 2)).view(x.shape)


def test_a_grid_that_fits_both_ways_is_said_and_not_guessed():
    model = sharp(nn.Sequential(AmbiguousBlock(), AmbiguousBlock()))
    x = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    keep, recorder, _ = record(model, lambda: model(x))
    assert not keep.states()
    assert any("which axis holds tokens is not known" in note for note in recorder.notes)


def test_blocks_with_something_else_between_each_two_of_them():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.shrink = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            self.blocks = nn.ModuleList(Block(32, 4, fused=True, causal=False) for _ in range(3))

        def forward(self, x):
            for shrink, block in zip(self.shrink, self.blocks, strict=True):
                x = block(shrink(x)[:, 1:])
            return x

    model = sharp(Pyramid())
    keep, recorder, _ = record(model, lambda: model(states()))
    assert recorder.anatomy.stacks[0].paths == ("blocks.0", "blocks.1", "blocks.2")
    assert [state.shape[1] for state in keep.states().values()] == [8, 8, 7, 6]
    assert list(keep.states("read", "out")) == [0]  # what the later blocks read is no layer's output


def test_cross_attention_to_cached_keys_is_still_cross_attention():
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    model = sharp(hf.T5ForConditionalGeneration(config))
    anatomy = anatomy_of(model, ids(2), decoder_input_ids=ids(2, 3))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids(2), **options)
    keep = Keep()
    with Recorder(model, [keep], anatomy=anatomy):
        assert torch.equal(model.generate(ids(2), **options), plain)
    decoder = [(call.layer, call.part, call.attention.shape[2:]) for call in keep.calls if call.stack == "decoder"]
    assert decoder == [
        (layer, part, (1, step if part == "self" else 9))
        for step in (1, 2, 3)
        for layer in (1, 2)
        for part in ("self", "cross")
    ]


def test_a_survey_that_fails_leaves_nothing_behind():
    class Failing(PlainGPT):
        def forward(self, ids):
            self.h[0](self.wte(ids))
            raise KeyboardInterrupt

    model = Failing()
    with pytest.raises(KeyboardInterrupt):
        survey(model, lambda: model(tokens()))
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
