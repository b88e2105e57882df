"""One decoding step on a cache: its rows are the last query's of a full prefill, and the cache stays as it was."""

import copy
import functools

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    StaticCache,
    T5Config,
    T5Model,
)

import fullrank
from fullrank.capture.own_copy import own_copy
from oracles import maps

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


PAST, SEQUENCES, LAYERS, HEADS, WINDOW = 20, 3, 2, 4, 8
OF_A_ROW = ("entropy", "normalized_entropy", "effective_keys", "inverse_participation", "sink_mass")
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 50}
GROUPED = SIZES | {"intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": None, "initializer_range": 0.3}


def build(name):
    if name == "llama":
        return LlamaModel(LlamaConfig(**GROUPED))
    if name == "mistral":
        return MistralModel(MistralConfig(**GROUPED, sliding_window=WINDOW))
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Model(
        GPT2Config(
            n_layer=LAYERS, n_head=HEADS, n_embd=32, vocab_size=50, n_positions=64, initializer_range=0.5, **special
        )
    )


@functools.cache
def model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(name).eval()


@functools.cache
def ids():
    return torch.randint(1, 50, (SEQUENCES, PAST + 1), generator=torch.Generator().manual_seed(1))


def filled(name, kind, *, grad=False, mask=None):
    """A cache that holds all tokens but the last."""
    network = model(name)
    cache = DynamicCache(config=network.config) if kind == "dynamic" else StaticCache(network.config, max_cache_len=32)
    with torch.set_grad_enabled(grad):
        network(ids()[:, :PAST], attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def step(cache, **more):
    return {"input_ids": ids()[:, PAST:], "past_key_values": cache, **more}


def eager_maps(name):
    """(layer, sequence, head, query, key) of a full prefill, in float64."""
    eager = copy.deepcopy(model(name)).double()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(eager(ids(), output_attentions=True, use_cache=False).attentions)


def held(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_decoding_step_has_the_last_row_of_a_full_prefill(name, kind):
    report = examine(model(name), step(filled(name, kind)))
    A = eager_maps(name)
    first = PAST + 1 - WINDOW if name == "mistral" else 0
    visible = torch.zeros(PAST + 1, PAST + 1, dtype=torch.bool)
    visible[PAST, first:] = True
    for metric in OF_A_ROW:
        for layer in range(LAYERS):
            for head in range(HEADS):
                (row,) = report.rows.where(metric=metric, layer=layer + 1, head=head, scope="all").rows
                expected = [getattr(maps, metric)(A[layer, b, head], visible, [PAST]) for b in range(SEQUENCES)]
                assert row.value == pytest.approx(sum(expected) / SEQUENCES, rel=1e-5), (metric, layer, head)
                assert row.n == SEQUENCES


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_is_neither_grown_nor_written_into(kind):
    cache = filled("mistral", kind)
    before, length = held(cache), int(cache.get_seq_length())
    examine(model("mistral"), step(cache, use_cache=True))
    assert int(cache.get_seq_length()) == length
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(before, held(cache), strict=True))


def test_a_cache_that_autograd_has_made_can_be_continued():
    report = examine(model("llama"), step(filled("llama", "dynamic", grad=True)), spectrum=False)
    plain = examine(model("llama"), step(filled("llama", "dynamic")), spectrum=False)
    assert report.rows == plain.rows


def test_a_step_is_examined_on_the_stack_that_prefill_names_and_causality_is_not_guessed():
    prefill = examine(model("llama"), {"input_ids": ids(), "use_cache": True}, spectrum=False)
    decode = examine(model("llama"), step(filled("llama", "dynamic")), spectrum=False)
    for report in (prefill, decode):
        (stack,) = report.about["stacks"]
        assert (stack["name"], stack["causal"], stack["blocks"]) == ("decoder", True, LAYERS)
    assert decode.about["input"]["tokens"] == SEQUENCES
    assert any("continues a cache" in note for note in decode.about["notes"])


def test_what_one_token_cannot_say_is_missing_with_the_reason():
    report = examine(model("llama"), step(filled("llama", "dynamic")))
    for metric in ("similarity", "residual", "stable_rank", "centered_stable_rank", "numerical_rank", "token_energy"):
        rows = report.rows.where(metric=metric).rows
        assert rows, metric
        for row in rows:
            assert row.value is None
            assert "two real tokens" in row.note, metric
    for metric in ("attention_s1", "attention_s2", "smoothing_gain", "selectivity"):
        rows = report.rows.where(metric=metric).rows
        assert rows, metric
        for row in rows:
            assert row.value is None
            assert "one query" in row.note or "fewer than two queries" in row.note
    known = {row.metric for row in report.rows if row.value is not None}
    assert {"rms", "update_share", "neighbour_cosine", "channel_entropy"} <= known


def test_padded_keys_in_the_cache_are_not_seen():
    mask = torch.ones(SEQUENCES, PAST + 1, dtype=torch.long)
    mask[1, :7] = 0
    report = examine(
        model("llama"), step(filled("llama", "dynamic", mask=mask[:, :PAST]), attention_mask=mask), spectrum=False
    )
    alone = DynamicCache(config=model("llama").config)
    with torch.no_grad():
        model("llama")(ids()[1:2, 7:PAST], past_key_values=alone)
    rest = examine(model("llama"), {"input_ids": ids()[1:2, PAST:], "past_key_values": alone}, spectrum=False)
    for head in range(HEADS):
        place = {"metric": "effective_keys", "layer": 1, "head": head, "scope": "all"}
        (row,), (single,) = report.rows.where(**place).rows, rest.rows.where(**place).rows
        A = eager_maps("llama")[0, :, head, PAST]
        unpadded = [torch.special.entr(A[b]).sum().exp().item() for b in (0, 2)]
        assert row.value == pytest.approx((sum(unpadded) + single.value) / 3, rel=1e-5)


def test_several_new_tokens_on_a_cache_are_the_later_rows_of_a_prefill():
    cache = DynamicCache(config=model("llama").config)
    with torch.no_grad():
        model("llama")(ids()[:, :12], past_key_values=cache)
    report = examine(model("llama"), {"input_ids": ids()[:, 12:], "past_key_values": cache})
    A = eager_maps("llama")
    visible = torch.ones(PAST + 1, PAST + 1, dtype=torch.bool).tril()
    for head in range(HEADS):
        (row,) = report.rows.where(metric="entropy", layer=2, head=head, scope="all").rows
        expected = [maps.entropy(A[1, b, head], visible, range(12, PAST + 1)) for b in range(SEQUENCES)]
        assert row.value == pytest.approx(sum(expected) / SEQUENCES, rel=1e-5)


def test_an_encoder_decoder_step_keeps_its_cross_attention():
    sizes = {"num_layers": 1, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "vocab_size": 50}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = T5Model(T5Config(**sizes)).eval()
    with torch.no_grad():
        past = network(input_ids=ids(), decoder_input_ids=ids()[:, :4], use_cache=True)
    batch = {
        "encoder_outputs": (past.encoder_last_hidden_state,),
        "decoder_input_ids": ids()[:, 4:5],
        "past_key_values": past.past_key_values,
    }
    report = examine(network, batch)
    assert {row.part for row in report.rows if row.site == "attention"} == {"self", "cross"}
    cross = report.rows.where(site="attention", part="cross", metric="normalized_entropy").rows
    assert cross
    assert all(0 < row.value <= 1 for row in cross)


def test_what_holds_no_tensor_is_passed_as_it_is():
    for value in (None, 3, "text", (1, 2), torch.float32, ids(), {"a": ids()}):
        assert own_copy(value) is value
