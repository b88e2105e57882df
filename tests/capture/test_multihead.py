"""`nn.MultiheadAttention` in all its modes: the map is the one that the module itself returns when it is asked to."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain import sharp, states
from seen import assert_identical, record
from torch import nn
from torch.testing import assert_close

HEADS, TOKENS, KEYS, SEQUENCES = 4, 5, 7, 3


class Block(nn.Module):
    """A block that attends to itself, or to a memory of other widths."""

    def __init__(self, *, cross: bool, **options) -> None:
        super().__init__()
        widths = {"kdim": 20, "vdim": 12} if cross else {}
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, HEADS, **widths, **options)
        self.mlp, self.cross = nn.Linear(32, 32), cross

    def given(self, x, memory):
        y = self.norm(x)
        return (y, *memory) if self.cross else (y, y, y)

    def forward(self, x, memory, **call):
        x = x + self.attention(*self.given(x, memory), **call)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))

    def forward(self, x, memory, **call):
        for block in self.blocks:
            x = block(x, memory, **call)
        return x


def observed(*, cross=False, unbatched=False, batch_first=True, call=None, **options):
    """The recorded calls and, block by block, the maps that the module returns on the same input."""
    call = call or {}
    model = sharp(Model(cross=cross, batch_first=batch_first, **options))
    x, memory = states(SEQUENCES, TOKENS), (states(SEQUENCES, KEYS, 20), states(SEQUENCES, KEYS, 12) + 1)
    if unbatched:
        x, memory = x[0], tuple(one[0] for one in memory)
    elif not batch_first:
        x, memory = x.transpose(0, 1), tuple(one.transpose(0, 1) for one in memory)

    def run():
        with torch.no_grad():
            return model(x, memory, **call)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = run()
        keep, recorder, during = record(model, run)
        assert_identical(before, during)
        maps = []
        with torch.no_grad():
            for block in model.blocks:
                asked = call | {"need_weights": True, "average_attn_weights": False}
                weights = block.attention(*block.given(x, memory), **asked)[1]
                maps.append(weights if weights.ndim == 4 else weights[None])
                x = block(x, memory, **call)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert [(c.layer, c.part) for c in keep.calls] == [(1, "cross" if cross else "self"), (2, keep.calls[0].part)]
    return keep.calls, maps, model, recorder


def assert_same(calls, maps):
    for call, weights in zip(calls, maps, strict=True):
        assert call.attention.shape == tuple(weights.shape)
        assert_close(call.attention.dense(), weights, atol=1e-5, rtol=1e-5)
        assert_close(call.attention.matmat(call.value), weights @ call.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_with_and_without_weights_averaged_or_not(cross, call, batch_first):
    calls, maps, _, recorder = observed(cross=cross, batch_first=batch_first, call=call)
    assert_same(calls, maps)
    assert recorder.anatomy.stacks[0].heads == HEADS
    assert calls[0].kernel == ("softmax" if call.get("need_weights", True) else "scaled_dot_product_attention")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("cross", [False, True])
def test_a_key_that_is_learned_or_zero_is_a_key(cross, options, need_weights):
    calls, maps, _, _ = observed(cross=cross, call={"need_weights": need_weights}, **options)
    assert_same(calls, maps)
    more = sum(options.get(name, False) for name in ("add_bias_kv", "add_zero_attn"))
    assert calls[0].attention.shape[-1] == (KEYS if cross else TOKENS) + more


def _masks():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    several = torch.rand(SEQUENCES * HEADS, TOKENS, TOKENS, generator=generator) < 0.4
    several[..., 0] = False  # every query sees something
    added = torch.randn(TOKENS, TOKENS, generator=generator)
    return {
        "bool": torch.eye(TOKENS, dtype=torch.bool).roll(1, 0),  # True is hidden
        "causal bool": hidden,
        "causal float": torch.zeros(TOKENS, TOKENS).masked_fill(hidden, -torch.inf),
        "float": added,
        "bool per head": several,
        "float per head": torch.randn(SEQUENCES * HEADS, TOKENS, TOKENS, generator=generator),
    }


def _padding():
    hidden = torch.zeros(SEQUENCES, TOKENS, dtype=torch.bool)
    hidden[1, 3:] = True
    return {"none": None, "bool": hidden, "float": torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("mask", "padding"),
    [
        (mask, padding)
        for mask, padding in itertools.product([None, *_masks()], _padding())
        # torch warns where the two are of different kinds
        if not (mask and padding != "none") or mask.startswith(("causal " + padding, padding))
    ],
)
def test_masks_of_every_kind(mask, padding, need_weights):
    call = {"need_weights": need_weights, "key_padding_mask": _padding()[padding]}
    call["attn_mask"] = None if mask is None else _masks()[mask]
    calls, maps, _, recorder = observed(call=call)
    assert_same(calls, maps)
    causal = mask in ("causal bool", "causal float")
    assert all(c.causal == causal for c in calls)
    assert recorder.anatomy.stacks[0].name == ("decoder" if causal else "encoder")
    if mask is None and padding != "none":
        assert torch.equal(calls[0].real_keys, ~_padding()["bool"])


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_causal_hint(need_weights):
    hidden = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    call = {"need_weights": need_weights, "attn_mask": hidden, "is_causal": True}
    calls, maps, _, _ = observed(call=call)
    assert_same(calls, maps)
    assert all(c.causal for c in calls)
    assert calls[0].attention.visible_count().flatten().tolist()[:TOKENS] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_one_sequence_without_a_batch_axis(masked, cross, need_weights):
    call = {"need_weights": need_weights}
    if masked:
        keys = KEYS if cross else TOKENS
        call["attn_mask"] = torch.zeros(HEADS, TOKENS, keys).index_fill(2, torch.tensor([1]), -torch.inf)
        call["key_padding_mask"] = torch.zeros(keys).index_fill(0, torch.tensor([keys - 1]), -torch.inf)
    calls, maps, _, _ = observed(cross=cross, unbatched=True, call=call)
    assert_same(calls, maps)
    assert calls[0].attention.shape[0] == 1


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_decoder_of_nn_transformer(norm_first, batch_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, HEADS, 64, **options), 2, enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, HEADS, 64, **options), 2)
        model = sharp(
            nn.Transformer(32, HEADS, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first)
        )
    source, target = states(SEQUENCES, KEYS), states(SEQUENCES, TOKENS) + 1
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    asked = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: asked.__setitem__(name, (m, args, kwargs)), with_kwargs=True
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]

    def run():
        with torch.no_grad():
            return model(source, target, tgt_mask=causal)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = run()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for handle in handles:
        handle.remove()
    keep, recorder, during = record(model, run)
    assert_identical(before, during)
    assert [(s.name, s.calls, s.causal) for s in recorder.anatomy.stacks] == [
        ("encoder", (("self",),) * 2, False),
        ("decoder", (("self", "cross"),) * 2, True),
    ]
    for call in keep.calls:
        module, args, kwargs = asked[call.path]
        with torch.no_grad():
            weights = module(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
        assert_close(call.attention.dense(), weights, atol=1e-5, rtol=1e-5)
    for stack in ("encoder", "decoder"):
        assert set(keep.states("stream", "mid", stack)) == {1, 2}
        assert bool(keep.states("read", "mid", stack)) == norm_first
