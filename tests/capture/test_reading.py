"""Masks, padding, caches and number formats: what the kernel was really given."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import ENDS, TEXT, build, ids
from plain import PlainGPT, sharp, tokens
from seen import Keep, assert_identical, plain_hooks, record
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from fullrank.capture import KernelCall, Recorder, survey
from fullrank.capture.reading import MaskReader, Unreadable, looks_back, read

LEFT = torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] + [1] * 8])
RIGHT = LEFT.flip(1)


def sdpa(q, k, v, **options) -> KernelCall:
    return KernelCall("sdpa", v, v.dtype, query=q, key=k, **options)


@pytest.fixture
def qkv(generator):
    return tuple(torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))


def masks_of(generator):
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden_keys = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    bias = torch.randn(1, 4, 6, 6, generator=generator)
    low = torch.finfo(torch.float32).min
    return {
        "none": None,
        "boolean": causal,
        "boolean, padded": causal & hidden_keys,
        "additive -inf": torch.zeros(6, 6).masked_fill(~causal, -torch.inf),
        "additive lowest": torch.where(causal & hidden_keys, 0.0, low),
        "bias": bias,
        "bias plus lowest": bias + torch.where(causal & hidden_keys, 0.0, low),
    }


@pytest.mark.parametrize("name", list(masks_of(torch.Generator())))
def test_every_kind_of_mask_gives_the_kernels_output(name, qkv, generator):
    q, k, v = qkv
    mask = masks_of(generator)[name]
    reading = read(sdpa(q, k, v, mask=mask, scale=0.7), 2)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    assert_close(reading.attention.matmat(reading.value), expected, atol=1e-5, rtol=1e-5)
    assert reading.causal == (name not in ("none", "bias"))
    assert looks_back(sdpa(q, k, v, mask=mask), MaskReader()) == reading.causal
    padded = "padded" in name or "lowest" in name
    seen = reading.seen_keys()
    assert (seen is not None and not bool(seen[1, 3:].any()) and bool(seen[0].all())) == padded


def test_the_causal_flag_meets_its_mask_and_aligns_top_left(qkv):
    q, k, v = qkv
    reading = read(sdpa(q[:, :, :4], k, v, causal=True), 2)
    expected = functional.scaled_dot_product_attention(q[:, :, :4], k, v, is_causal=True)
    assert_close(reading.attention.matmat(v), expected, atol=1e-5, rtol=1e-5)
    real = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])[:, None, None]
    both = read(sdpa(q, k, v, causal=True, mask=real), 2)
    mask = real & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(both.attention.matmat(v), expected, atol=1e-5, rtol=1e-5)
    assert both.causal


def test_heads_folded_into_the_batch_are_told_apart(qkv):
    q, k, v = qkv
    folded = [x.reshape(8, 6, 8) for x in qkv]
    reference = read(sdpa(q, k, v), 2).attention.dense()
    assert_close(read(sdpa(*folded), 2).attention.dense(), reference)
    assert_close(read(sdpa(*folded), 2, heads=4).attention.dense(), reference)
    assert_close(read(sdpa(*folded, heads=4), 1).attention.dense(), reference)  # windows of one sequence
    assert read(sdpa(*folded), 8).attention.shape == (8, 1, 6, 6)  # one head
    mask = torch.rand(8, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    expected = functional.scaled_dot_product_attention(*folded, attn_mask=mask).view(2, 4, 6, 8)
    reading = read(sdpa(*folded, mask=mask), 2)
    assert_close(reading.attention.matmat(reading.value), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(Unreadable, match="cannot be told apart"):
        read(sdpa(*folded), 3)


def test_five_axes(generator):
    q, k, v = (torch.randn(2, 3, 4, 5, 8, generator=generator) for _ in range(3))  # windows beside the batch
    mask = torch.rand(2, 3, 1, 5, 5, generator=generator) > 0.4
    mask[..., 0] = True
    reading = read(sdpa(q, k, v, mask=mask), 2)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(reading.attention.matmat(reading.value), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_mask_is_read_once_and_again_when_it_was_changed():
    masks = MaskReader()
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    first = masks.read(mask)[0]
    assert masks.read(mask)[0] is first
    mask[0, 1] = True
    assert masks.read(mask)[0] is not first


@pytest.mark.parametrize("value", [-1e4, -65504.0, -1e9, float("-inf"), torch.finfo(torch.float32).min])
def test_whatever_large_number_a_model_hides_keys_with(value, generator):
    s = torch.randn(1, 2, 5, 5, generator=generator) * 10
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    s = s + torch.zeros(5, 5).masked_fill(hidden, value)
    v = torch.randn(1, 2, 5, 4, generator=generator)
    reading = read(KernelCall("softmax", v, v.dtype, weights=s.softmax(-1), logits=s), 1)
    assert reading.causal
    assert torch.equal(reading.attention.visible_count().squeeze(), torch.arange(1, 6))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("real", [LEFT, RIGHT])
def test_padding_is_told_or_seen(implementation, real):
    model = sharp(hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=implementation)))
    batch = {"input_ids": ids(), "attention_mask": real, "use_cache": False}
    told, recorder, _ = record(model, lambda: model(**batch), real=real.bool())
    assert recorder.anatomy.stacks[0].causal
    seen, _, _ = record(model, lambda: model(**batch))
    for call in (*told.calls, *seen.calls):
        assert torch.equal(call.real_keys, real.bool())
        assert torch.equal(call.real_queries, real.bool())
        assert call.causal
        count = (real.cumsum(1) * real)[:, None]
        assert torch.equal(call.attention.visible_count().expand(3, 1, 9) * real[:, None], count)
    for event in told.events:
        if event not in told.calls:
            assert torch.equal(event.real, real.bool())


def test_padding_of_named_stacks():
    case = build("t5")
    encoder, decoder = case.batch["attention_mask"].bool(), torch.ones(3, 7, dtype=torch.bool)
    decoder[0, 5:] = False
    keep, _, _ = record(case.model, case.run, real={"encoder": encoder, "decoder": decoder})
    for call in keep.calls:
        assert torch.equal(call.real_queries, encoder if call.stack == "encoder" else decoder)
        assert torch.equal(call.real_keys, decoder if (call.stack, call.part) == ("decoder", "self") else encoder)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_steps_with_grouped_heads_and_padding(cache):
    """A step of one query arrives at the kernel with the heads of a group on the token axis."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, **ENDS))
    sharp(model)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    options = {"input_ids": ids(), "attention_mask": LEFT} | options
    if cache == "static":
        options["disable_compile"] = True
    anatomy = survey(model, lambda: model(ids(), attention_mask=LEFT))
    plain = model.generate(**options)
    keep = Keep()
    with Recorder(model, [keep], anatomy=anatomy) as recorder:
        seen = model.generate(**options)
    assert torch.equal(plain, seen)
    assert not recorder.notes
    with plain_hooks(model, [f"model.layers.{i}.self_attn.o_proj" for i in range(2)], inputs=True) as kernel:
        model.generate(**options)
    assert [call.attention.shape[:3] for call in keep.calls[2:]] == [(3, 4, 1)] * 4
    for call, (_, output) in zip(keep.calls, kernel, strict=True):
        assert call.value.shape[1] == 2  # key-value heads as they are, not repeated
        AV = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        real = LEFT.bool() if AV.shape[1] == 9 else torch.ones(3, 1, dtype=torch.bool)
        assert_close(AV[real], output[real], atol=1e-5, rtol=1e-5)


def test_packed_documents_are_read_from_the_mask_of_the_call():
    model = sharp(hf.LlamaModel(hf.LlamaConfig(**TEXT)))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    keep, _, _ = record(model, lambda: model(ids(1), position_ids=positions, use_cache=False))
    for call in keep.calls:
        assert call.causal
        assert torch.equal(call.attention.visible_count().squeeze(), positions[0] + 1)


def test_autocast_is_seen_as_the_kernel_computes():
    model = sharp(PlainGPT())

    def forward():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return model(tokens())

    before = forward()
    keep, _, during = record(model, forward)
    assert_identical(before, during)
    assert {call.dtype for call in keep.calls} == {torch.bfloat16}
    assert {call.value.dtype for call in keep.calls} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strength", [-30.0, 0.0])
def test_what_a_dropped_sink_column_weighed_is_summed_precisely_and_never_negative(dtype, strength, generator):
    s = torch.randn(1, 2, 64, 512, generator=generator)
    s = torch.cat([s, torch.full((1, 2, 64, 1), strength + 6)], -1)
    p = s.softmax(-1).to(dtype)
    v = torch.randn(1, 2, 512, 8, generator=generator)
    weights = p[..., :-1]
    sink = read(KernelCall("softmax", v, dtype, weights=weights, sink_column=True), 1).attention.sink
    assert bool((sink >= 0).all())
    assert_close(sink.double(), (1 - weights.double().sum(-1)).clamp(min=0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision(implementation):
    model = hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=implementation))
    model = sharp(model).to(torch.bfloat16)
    with torch.no_grad():
        before = model(ids(), use_cache=False)
        keep, _, during = record(model, lambda: model(ids(), use_cache=False))
    assert_identical(before, during)
    assert {call.dtype for call in keep.calls} == {torch.bfloat16}
    assert set(keep.states("stream", "mid")) == {1, 2}
    assert set(keep.states("read", "mid")) == {1, 2}
    assert {event.value.dtype for event in keep.events if event not in keep.calls} == {torch.bfloat16}


def test_dropout_in_training_leaves_the_map_before_it_to_the_kernel():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.3, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    anatomy = survey(model, lambda: model(x))
    torch.manual_seed(0)
    plain = model(x)
    keep = Keep()
    torch.manual_seed(0)
    with Recorder(model, [keep], anatomy=anatomy):
        seen = model(x)
    assert torch.equal(plain, seen)
    assert len(keep.calls) == 2
    assert_close(keep.calls[0].attention.dense().sum(-1), torch.ones(2, 4, 5))
    assert set(keep.states("stream", "mid")) == {1, 2}


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_on_the_map_is_no_part_of_it(need_weights):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=need_weights)[0]

    model = sharp(nn.Sequential(Layer(), Layer()))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    _, weights = model[0].attention(x, x, x, average_attn_weights=False)
    keep, _, _ = record(model.train(), lambda: model(x))
    assert_close(keep.calls[0].attention.dense(), weights)


@pytest.mark.parametrize("heads", [None, 4])
def test_heads_before_sequences(heads, generator):
    q, k, v = (torch.randn(4, 3, 6, 8, generator=generator) for _ in range(3))  # four heads, three sequences
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    reading = read(sdpa(q, k, v, mask=mask), 3, heads=heads)
    assert reading.attention.shape == (3, 4, 6, 6)
    assert_close(reading.attention.matmat(reading.value), expected, atol=1e-5, rtol=1e-5)


def test_one_mask_is_for_text_not_for_images():
    case = build("clip")
    real = torch.ones(2, 9)
    real[0, 7:] = 0
    keep, _, _ = record(case.model, case.run, real=real)
    for event in keep.events:
        if event not in keep.calls:
            assert (event.real is not None) == (event.stack == "decoder")
            assert event.real is None or torch.equal(event.real, real.bool())
