"""Plain torch code: what is seen, with nothing to go by but the functions it calls."""

from __future__ import annotations

import pytest
import torch
from plain import Block, InPlaceBlock, ParallelBlock, PlainGPT, PreNorm, SoftmaxAttention, sharp, states, tokens
from seen import assert_identical, plain_hooks, record
from torch import nn
from torch.testing import assert_close


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("fused", [True, False])
def test_nanogpt_is_seen_whole(fused):
    model = sharp(PlainGPT(fused=fused))
    before = run(model, tokens())
    keep, recorder, during = record(model, lambda: run(model, tokens()))
    assert_identical(before, during)
    (stack,) = recorder.anatomy.stacks
    assert (stack.name, stack.paths, stack.heads, stack.width) == ("decoder", ("h.0", "h.1", "h.2"), 4, 32)
    x = model.wte(tokens()) + model.wpe(torch.arange(9))
    assert_close(keep.states()[0], x)
    for layer, (block, call) in enumerate(zip(model.h, keep.calls, strict=True), 1):
        assert (call.layer, call.part, call.path, call.causal) == (layer, "self", f"h.{layer - 1}.attn", True)
        assert torch.equal(call.attention.visible_count().squeeze(), torch.arange(1, 10))
        assert torch.equal(keep.states("read", "out")[layer - 1], block.ln_1(x))
        x = x + block.attn(block.ln_1(x))
        assert torch.equal(keep.states("stream", "mid")[layer], x)
        assert torch.equal(keep.states("read", "mid")[layer], block.ln_2(x))
        x = x + block.mlp(block.ln_2(x))
        assert torch.equal(keep.states()[layer], x)


def test_both_ways_of_writing_attention_give_the_same_map():
    fused, by_hand = (sharp(PlainGPT(fused=fused)) for fused in (True, False))
    one = record(fused, lambda: run(fused, tokens()))[0].calls
    other = record(by_hand, lambda: run(by_hand, tokens()))[0].calls
    for a, b in zip(one, other, strict=True):
        assert_close(a.attention.dense(), b.attention.dense())
        assert_close(a.value, b.value)
        s, t = a.attention.summary(), b.attention.summary()
        assert_close(s.logit_std, t.logit_std, atol=1e-5, rtol=1e-5)  # scores of one are float32 sums in another order
        assert_close(s.entropy, t.entropy, atol=1e-5, rtol=1e-5)


def test_additions_in_place_do_not_hide_the_state_between():
    plain, in_place = sharp(PlainGPT()), sharp(PlainGPT(block=InPlaceBlock))
    one = record(plain, lambda: run(plain, tokens()))[0]
    other = record(in_place, lambda: run(in_place, tokens()))[0]
    for layer in (1, 2, 3):
        assert_close(one.states("stream", "mid")[layer], other.states("stream", "mid")[layer])
        assert_close(one.states()[layer], other.states()[layer])


class PreNormed(nn.Module):
    """A wrapper whose name says norm and whose output is not a norm's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(32), inner

    def forward(self, x):
        return self.inner(self.norm(x))


class WrappedBlock(Block):
    def __init__(self, width, heads, **options):
        super().__init__(width, heads, **options)
        self.attn, self.mlp = PreNormed(self.attn), PreNormed(self.mlp)

    def forward(self, x):
        x = self.attn(x) + x
        return self.mlp(x) + x


def test_what_a_wrapper_called_norm_returns_is_not_what_a_norm_hands_on():
    model = sharp(PlainGPT(block=WrappedBlock))
    keep, _, _ = record(model, lambda: run(model, tokens()))
    for layer, block in enumerate(model.h, 1):
        assert torch.equal(keep.states("read", "out")[layer - 1], block.attn.norm(keep.states()[layer - 1]))
        assert torch.equal(keep.states("read", "mid")[layer], block.mlp.norm(keep.states("stream", "mid")[layer]))


class ScaledBlock(Block):
    """DeepNorm, or learned weights of the residual: it is scaled before it is added to."""

    def __init__(self, width, heads, **options):
        super().__init__(width, heads, **options)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        x = x * 1.5 + self.attn(self.ln_1(x))
        return self.weight * x + self.mlp(self.ln_2(x))


def test_a_residual_that_is_scaled_by_a_number_or_by_channels_is_followed():
    model = sharp(PlainGPT(block=ScaledBlock))
    with plain_hooks(model, [f"h.{n}.ln_2" for n in range(3)], inputs=True) as seen:
        run(model, tokens())
    keep, _, _ = record(model, lambda: run(model, tokens()))
    for layer, (_, value) in enumerate(seen, 1):
        assert torch.equal(keep.states("stream", "mid")[layer], value)


class BlendedBlock(Block):
    """Each token decides how much of the residual stays: no sum of the state and a branch."""

    def forward(self, x):
        x = torch.lerp(x, self.attn(self.ln_1(x)), x.mean(-1, keepdim=True).sigmoid())
        return torch.lerp(x, self.mlp(self.ln_2(x)), x.mean(-1, keepdim=True).sigmoid())


def test_residuals_that_cannot_be_followed_are_said_and_not_guessed():
    model = sharp(PlainGPT(block=BlendedBlock))
    keep, recorder, _ = record(model, lambda: run(model, tokens()))
    assert list(keep.states()) == [0, 1, 2, 3]
    assert not keep.states("stream", "mid")
    assert any("cannot be followed" in note for note in recorder.notes)


def test_parallel_branches_have_no_state_between():
    model = sharp(PlainGPT(block=ParallelBlock))
    keep, recorder, _ = record(model, lambda: run(model, tokens()))
    assert not keep.states("stream", "mid")
    assert keep.states("read", "out")
    assert any("parallel" in note for note in recorder.notes)


@pytest.mark.parametrize("way", ["einsum", "values first", "folded", "module", "one head", "sink column"])
def test_softmax_is_attention_when_it_multiplies_values(way):
    model = sharp(nn.Sequential(*(PreNorm(SoftmaxAttention(way)) for _ in range(2))))
    x = states()
    before = run(model, x)
    kernel = []
    for block in model:
        block.attention.o.register_forward_pre_hook(lambda module, args: kernel.append(args[0]))
    keep, recorder, during = record(model, lambda: (kernel.clear(), run(model, x))[1])
    assert_identical(before, during)
    assert recorder.anatomy.stacks[0].name == "encoder"
    assert len(keep.calls) == 2
    for call, output in zip(keep.calls, kernel, strict=True):
        assert call.attention.shape == (3, 1 if way == "one head" else 4, 9, 9)
        recomputed = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        assert_close(recomputed, output, atol=1e-5, rtol=1e-5)
        rows = call.attention.dense().sum(-1)
        assert bool(rows.min() < 0.99) == (way == "sink column")
        assert torch.isfinite(call.attention.summary().logit_std).all()


@pytest.mark.parametrize("way", ["exp over sum", "channels"])
def test_what_is_no_attention_over_tokens_is_not_reported_as_such(way):
    model = sharp(nn.Sequential(*(PreNorm(SoftmaxAttention(way)) for _ in range(2))))
    keep, recorder, _ = record(model, lambda: run(model, states()))
    assert not keep.calls
    assert list(keep.states()) == [0, 1, 2]
    assert "stack backbone: no token attention was seen in its 2 blocks." in recorder.notes


class Router(nn.Module):
    """A dense mixture: the softmax over experts multiplies what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        answers = torch.stack([expert(x) for expert in self.experts], -2)
        return torch.einsum("bte,bted->btd", share, answers)


class MixtureBlock(Block):
    def __init__(self, width, heads, **options):
        super().__init__(width, heads, **options)
        self.mlp = Router()


@pytest.mark.parametrize("fused", [True, False])
def test_a_router_is_no_attention_and_its_experts_are_no_blocks(fused):
    model = sharp(PlainGPT(block=MixtureBlock, fused=fused))
    keep, recorder, _ = record(model, lambda: run(model, tokens()))
    assert recorder.anatomy.stacks[0].paths == ("h.0", "h.1", "h.2")
    assert [(call.layer, call.part) for call in keep.calls] == [(1, "self"), (2, "self"), (3, "self")]
    assert set(keep.states("stream", "mid")) == {1, 2, 3}


# ---------------------------------------------------------------- torch's own modules


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_on_the_reference_path(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    model = sharp(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = states() if batch_first else states().transpose(0, 1)
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[1, 6:] = True  # here True means hidden
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        before = run(model, x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    keep, recorder, during = record(model, lambda: run(model, x, src_key_padding_mask=padding))
    assert_identical(before, during)
    assert any(note.startswith("reference path") for note in recorder.notes)
    assert torch.backends.mha.get_fastpath_enabled()
    (stack,) = recorder.anatomy.stacks
    assert (stack.name, stack.heads, stack.paths) == ("encoder", 4, ("layers.0", "layers.1"))
    assert torch.equal(keep.states()[0], states())
    assert torch.equal(keep.states()[2], during if batch_first else during.transpose(0, 1))
    assert set(keep.states("stream", "mid")) == {1, 2}
    assert bool(keep.states("read", "mid")) == norm_first
    for call in keep.calls:
        assert call.attention.shape == (3, 4, 9, 9)
        assert torch.equal(call.real_keys, ~padding)
        assert torch.equal(call.real_queries, ~padding)
        assert not call.causal


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_and_without_weights(need_weights, batch_first):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=batch_first)

        def forward(self, x, **masks):
            y = self.norm(x)
            return x + self.attention(y, y, y, need_weights=need_weights, **masks)[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x, **masks):
            for layer in self.layers:
                x = layer(x, **masks)
            return x

    model = sharp(Model())
    x = states() if batch_first else states().transpose(0, 1)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    with torch.enable_grad():
        before = model(x, attn_mask=hidden).detach()  # with gradients there is no fast path
    keep, recorder, during = record(model, lambda: run(model, x, attn_mask=hidden))
    assert_identical(before, during)
    assert recorder.anatomy.stacks[0].name == "decoder"
    for layer, call in enumerate(keep.calls, 1):
        assert (call.layer, call.part, call.causal) == (layer, "self", True)
        assert call.kernel == ("softmax" if need_weights else "scaled_dot_product_attention")
        attention = model.layers[layer - 1].attention
        y = model.layers[layer - 1].norm(keep.states()[layer - 1])
        y = y if batch_first else y.transpose(0, 1)
        _, weights = attention(y, y, y, attn_mask=hidden, average_attn_weights=False)
        assert_close(call.attention.dense(), weights)
        AV = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        change = keep.states()[layer] - keep.states()[layer - 1]
        assert_close(attention.out_proj(AV), change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_looked_into_by_an_older_torch_too(need_weights, monkeypatch):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=need_weights)[0]

    model = sharp(nn.Sequential(Layer(), Layer()))
    now = record(model, lambda: run(model, states()))
    monkeypatch.delattr(torch.overrides, "redispatch_function", raising=False)
    before = record(model, lambda: run(model, states()))
    assert_identical(now[2], before[2])
    for one, other in zip(now[0].calls, before[0].calls, strict=True):
        assert torch.equal(one.attention.dense(), other.attention.dense())


def test_transformer_decoder_has_self_and_cross_attention():
    layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = sharp(nn.TransformerDecoder(layer, 2))
    x, memory = states(3, 9), states(3, 9, 32) * 2  # as many keys as queries: shapes do not tell cross from self
    keep, recorder, _ = record(model, lambda: run(model, x, memory))
    (stack,) = recorder.anatomy.stacks
    assert (stack.name, stack.causal, stack.calls) == ("decoder", False, (("self", "cross"),) * 2)
    assert [call.part for call in keep.calls] == ["self", "cross"] * 2


def test_encoder_and_decoder_of_nn_transformer_are_two_stacks_and_padding_follows_the_encoder():
    model = sharp(nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True))
    source, target = states(3, 9), states(3, 9) + 1
    real = torch.ones(3, 9, dtype=torch.bool)
    real[2, 5:] = False
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    masks = {"src_key_padding_mask": ~real, "memory_key_padding_mask": ~real, "tgt_mask": causal}
    keep, recorder, _ = record(model, lambda: run(model, source, target, **masks), real=real)
    assert [stack.name for stack in recorder.anatomy.stacks] == ["encoder", "decoder"]
    for call in keep.calls:
        if call.stack == "encoder":
            assert torch.equal(call.real_queries, real)
            assert torch.equal(call.real_keys, real)
        elif call.part == "cross":
            assert call.real_queries is None
            assert torch.equal(call.real_keys, real)
        else:
            assert call.causal
            assert call.real_keys is None
    for event in keep.events:
        if event not in keep.calls:
            assert (event.real is not None) == (event.stack == "encoder")


def test_a_single_sequence_without_a_batch_axis():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
    model = sharp(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    keep, _, _ = record(model, lambda: run(model, states()[0]))
    assert keep.states()[2].shape == (1, 9, 32)
    assert keep.calls[0].attention.shape == (1, 4, 9, 9)
