"""Rewriting attention calls: what a function makes of them equals the definition, whatever kernel the model calls."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from kinds import KINDS, TEXT, build, center, gpt2, ids, llama, naive, seen, uniform
from seen import Keep

from fullrank.capture import Recorder, survey
from fullrank.edit import Call, edits_in, replace_heads, rewrite_attention
from fullrank.errors import EditError

FUSED = [name for name in KINDS if name not in ("llama_eager", "gemma2", "plain_softmax", "torch_with_weights")]
MADE = ["llama_eager", "gemma2", "plain_softmax", "torch_with_weights"]


@pytest.mark.parametrize("name", KINDS)
def test_centring_after_the_kernel_is_attention_minus_the_uniform_map(name, monkeypatch):
    kind = build(name)
    with torch.no_grad():
        base = kind()
        with rewrite_attention(kind.model, seen(name), after=center):
            edited = kind()
        assert torch.equal(kind(), base)
        naive(monkeypatch, center=False)
        assert torch.allclose(kind(), base, atol=1e-5)
        naive(monkeypatch, center=True)
        twin = kind()
    assert torch.allclose(edited, twin, atol=1e-5), (edited - twin).abs().max()
    assert not torch.allclose(edited, base, atol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_the_map_can_be_replaced_whoever_made_it(name):
    kind = build(name)

    def averages(call: Call) -> Call:
        return call.change(weights=uniform(call))

    def plain_mean(call: Call, output):
        value = call.value.repeat_interleave(output.shape[1] // call.value.shape[1], 1)
        return (uniform(call) @ value).expand_as(output)

    with torch.no_grad():
        with rewrite_attention(kind.model, seen(name), before=averages):
            replaced = kind()
        with rewrite_attention(kind.model, seen(name), after=plain_mean):
            assert torch.allclose(replaced, kind(), atol=1e-10)


@pytest.mark.parametrize("name", FUSED)
def test_queries_keys_values_and_scale_are_those_of_the_edit(name, monkeypatch):
    kind = build(name)
    calls: list[Call] = []

    def half(call: Call) -> Call:
        calls.append(call)
        assert call.query is not None and call.key is not None
        width = call.query.shape[-1]
        scale = 1 / width**0.5 if call.scale is None else call.scale
        return call.change(query=call.query * 4, key=call.key / 2, scale=scale / 2, value=call.value * 3)

    with torch.no_grad():
        base = kind()
        with rewrite_attention(kind.model, seen(name), before=half):
            edited = kind()
        with rewrite_attention(kind.model, seen(name), after=lambda call, output: 3 * output):
            assert torch.allclose(edited, kind(), atol=1e-10)
    assert not torch.allclose(edited, base, atol=1e-2)
    batch = 2 if name == "vit" else 3
    assert {(call.query.ndim, call.query.shape[0], call.query.shape[1]) for call in calls} == {(4, batch, 4)}


@pytest.mark.parametrize("name", KINDS)
def test_attention_that_an_edit_computes_is_no_call_of_the_model(name):
    kind, made = build(name), []

    def attend(call: Call, output=None):
        made.append(call)
        _ = (call.value @ call.value.mT).softmax(-1) @ call.value
        return call if output is None else output

    with torch.no_grad():
        base = kind()
        with rewrite_attention(kind.model, seen(name), before=attend, after=attend):
            assert torch.allclose(kind(), base, atol=1e-12)
    assert len(made) == 2 * sum(len(parts) for stack in seen(name).stacks for parts in stack.calls)


@pytest.mark.parametrize("name", ["llama", "llama_padded", "falcon"])
def test_grouped_heads_are_not_repeated(name):
    kind = build(name)
    found: list[Call] = []
    with torch.no_grad(), rewrite_attention(kind.model, seen(name), before=lambda call: found.append(call) or call):
        kind()
    shared = 1 if name == "falcon" else 2
    heads = [(call.query.shape[1], call.key.shape[1], call.value.shape[1]) for call in found]
    assert heads == [(4, shared, shared)] * 3


@pytest.mark.parametrize("name", KINDS)
def test_a_bias_hides_a_key_from_all_queries(name, monkeypatch):
    kind = build(name)

    def hide(call: Call) -> Call:
        bias = torch.zeros(1, 1, 1, call.keys, dtype=call.value.dtype)
        bias[..., 1] = float("-inf")
        return call.change(bias=bias if call.bias is None else call.bias + bias)

    def check(call: Call, output):
        hidden = call.visible()
        value = call.value.clone()
        value[:, :, 1] = 1e6  # whatever it holds
        if call.weights is None:
            again = torch.nn.functional.scaled_dot_product_attention(
                call.query, call.key, value, call.additive(), scale=call.scale, enable_gqa=True
            )
            assert torch.allclose(again, output, atol=1e-6)
        assert hidden is None or hidden.dtype == torch.bool
        return output

    with torch.no_grad(), rewrite_attention(kind.model, seen(name), before=hide, after=check):
        edited = kind()
        if name in MADE:

            def mask(call: Call) -> Call:
                logits = call.logits.clone()
                logits[..., 1] = float("-inf")
                return call.change(logits=logits)

            with rewrite_attention(kind.model, seen(name), before=mask):
                assert torch.allclose(kind(), edited, atol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_scores_that_the_model_shows_can_be_changed(name, monkeypatch):
    kind = build(name)

    def cold(call: Call) -> Call:
        assert call.query is None and call.logits is not None
        return call.change(logits=call.logits * 2)

    with torch.no_grad():
        with rewrite_attention(kind.model, seen(name), before=cold):
            edited = kind()
        softmax = torch.nn.functional.softmax
        monkeypatch.setattr(torch.nn.functional, "softmax", lambda s, *args, **more: softmax(2 * s, *args, **more))
        assert torch.allclose(edited, kind(), atol=1e-10)


def test_a_mask_can_be_replaced():
    kind = build("bert")

    def look_back(call: Call) -> Call:
        lower = torch.ones(call.queries, call.keys, dtype=torch.bool).tril()[None, None]
        return call.change(mask=lower if call.mask is None else call.visible() & lower)

    def causal(call: Call) -> Call:
        return call.change(causal=True)

    with torch.no_grad():
        with rewrite_attention(kind.model, seen("bert"), before=look_back):
            one = kind()
        with rewrite_attention(kind.model, seen("bert"), before=causal):
            assert torch.allclose(kind(), one, atol=1e-12)
        moved = kind.batch["input_ids"].clone()
        moved[1, 5:] = 7
        kind.batch["input_ids"] = moved
        with rewrite_attention(kind.model, seen("bert"), before=look_back):
            assert torch.equal(kind()[1, :5], one[1, :5])


def test_a_causal_model_can_be_let_look_ahead():
    kind = build("gpt2")
    with torch.no_grad():
        base = kind()
        with rewrite_attention(kind.model, seen("gpt2"), before=lambda call: call.change(causal=False)):
            full = kind()
    assert not torch.allclose(full[:, 0], base[:, 0], atol=1e-3)


def test_calls_know_their_place():
    kind = build("t5")
    found: list[Call] = []
    with torch.no_grad(), rewrite_attention(kind.model, seen("t5"), before=lambda call: found.append(call) or call):
        kind()
    places = [(call.place.stack, call.place.layer, call.place.part) for call in found]
    decoder = [("decoder", layer, part) for layer in (1, 2, 3) for part in ("self", "cross")]
    assert places == [("encoder", layer, "self") for layer in (1, 2, 3)] + decoder
    assert found[0].place.path == "encoder.block.0.layer.0.SelfAttention"


@pytest.mark.parametrize(
    ("where", "number"),
    [({"stack": "encoder"}, 3), ({"part": "cross"}, 3), ({"layer": 2}, 3), ({"stack": "decoder", "layer": 2}, 2)],
)
def test_only_the_calls_that_are_meant_are_rewritten(where, number):
    kind = build("t5")
    found: list[Call] = []
    edit = rewrite_attention(kind.model, seen("t5"), before=lambda call: found.append(call) or call, **where)
    with torch.no_grad(), edit:
        kind()
    assert len(found) == number == len(edit.where)
    assert all(getattr(call.place, name) == value for call in found for name, value in where.items())


def test_calls_of_a_shared_module_are_told_apart_by_layer():
    kind = build("albert")
    found: list[int] = []
    edit = rewrite_attention(
        kind.model, seen("albert"), before=lambda call: found.append(call.place.layer) or call, layer=2
    )
    with torch.no_grad(), edit:
        kind()
        kind()
    assert found == [2, 2]


def test_what_is_visible_is_known():
    for name in ("llama", "llama_eager", "gemma2", "plain", "plain_softmax"):
        kind = build(name)
        found = []
        with (
            torch.no_grad(),
            rewrite_attention(
                kind.model, seen(name), before=lambda call, found=found: found.append(call.visible()) or call
            ),
        ):
            kind()
        for layer, visible in enumerate(found):
            lower = torch.ones(9, 9, dtype=torch.bool).tril()
            window = lower.triu(-3) if name == "gemma2" and layer % 2 == 0 else lower
            assert torch.equal(visible.expand(3, 4, 9, 9), window.expand(3, 4, 9, 9)), name


def test_heads_are_replaced_one_by_one(monkeypatch):
    kind = build("llama")
    with torch.no_grad():
        with replace_heads(kind.model, seen("llama"), 0.0, heads=[1, 3], layer=2) as edit:
            edited = kind()
            assert repr(edit) == "<replace the output of head 1, 3 at decoder layer 2 self (layers.1.self_attn)>"
        weight = kind.model.layers[1].self_attn.o_proj.weight
        weight[:, 8:16] = 0
        weight[:, 24:] = 0
        assert torch.allclose(edited, kind(), atol=1e-12)


def test_a_head_can_be_replaced_by_its_mean():
    kind = build("bert")
    outputs = []
    with (
        torch.no_grad(),
        rewrite_attention(
            kind.model, seen("bert"), after=lambda call, output: outputs.append(output) or output, layer=2
        ),
    ):
        kind()
    mean = outputs[0][:, [2]].mean((0, 2), keepdim=True)
    with torch.no_grad():
        with replace_heads(kind.model, seen("bert"), mean, heads=2, layer=2):
            edited = kind()

        def put(module, args):
            new = args[0].clone()
            new[..., 16:24] = mean.flatten()
            return (new,)

        kind.model.encoder.layer[1].attention.output.dense.register_forward_pre_hook(
            lambda module, args: put(module, args) if args[0].shape[-1] == 32 else None
        )
        assert torch.allclose(edited, kind(), atol=1e-12)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_decoding_with_a_cache_equals_the_whole_sequence(make):
    # a single query with grouped heads is packed into the token axis of the kernel: edits must not see that
    kind = make()
    kind.model.eval()
    tokens = kind.batch["input_ids"]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :2] = 0

    def damp(call: Call) -> Call:
        assert call.query.shape[:2] == (3, 4) and call.queries in (1, 6, 9)
        scale = torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None]
        return call.change(query=call.query * scale, value=call.value + 1)

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), rewrite_attention(kind.model, kind.anatomy(), before=damp):
        whole = kind.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        state = kind.model(tokens[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6], use_cache=True)
        for step in (6, 7, 8):
            state = kind.model(
                tokens[:, [step]],
                attention_mask=mask[:, : step + 1],
                position_ids=positions[:, [step]],
                past_key_values=state.past_key_values,
                use_cache=True,
            )
            assert torch.allclose(state.last_hidden_state[:, 0], whole[:, step], atol=1e-4)


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_an_edited_model_generates_the_same_text_with_every_cache(cache):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        anatomy = survey(model, lambda: model(ids(), use_cache=False))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(ids(), **options)
    with rewrite_attention(model, anatomy, before=lambda call: call.change(query=call.query / 3)):
        edited = model.generate(ids(), **options)
        assert torch.equal(edited, model.generate(ids(), **options, **cache))
    assert not torch.equal(edited, plain)
    assert torch.equal(plain, model.generate(ids(), **options))


def typed(kind, dtype: torch.dtype) -> None:
    kind.model.to(dtype)
    for name, item in kind.batch.items():
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            kind.batch[name] = item.to(dtype)


@pytest.mark.parametrize("name", ["gpt2", "plain", "plain_softmax", "torch_encoder"])
def test_outputs_keep_their_type_in_half_precision_and_under_autocast(name):
    kind = build(name)
    types = []

    def after(call, output):
        types.append(output.dtype)
        return center(call, output).double()

    def hide_nothing(call):
        return call.change(bias=torch.zeros(1, 1, call.queries, call.keys, dtype=torch.float64))

    typed(kind, torch.bfloat16)
    with torch.inference_mode(), rewrite_attention(kind.model, seen(name), before=hide_nothing, after=after):
        assert kind().dtype == torch.bfloat16
    typed(kind, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dtype = kind().dtype
        with rewrite_attention(kind.model, seen(name), before=hide_nothing, after=after):
            assert kind().dtype == dtype
    assert set(types) <= {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("name", ["llama", "plain", "gemma2", "torch_with_weights"])
def test_a_recorder_sees_calls_as_they_are_made(name):
    kind = build(name)
    keep = Keep(frozenset({"attention"}))
    change = (lambda c: c.change(logits=2 * c.logits)) if name in MADE else (lambda c: c.change(query=2 * c.query))
    plain = Keep(frozenset({"attention"}))
    with torch.no_grad():
        with Recorder(kind.model, [plain], anatomy=seen(name)):
            kind()
        edit = rewrite_attention(kind.model, seen(name), before=change, layer=1)
        with edit, Recorder(kind.model, [keep], anatomy=seen(name)):
            kind()
    edited, before = (one.calls[0].attention.dense() for one in (keep, plain))
    warmer = before**2  # twice the scores
    assert torch.allclose(edited, warmer / warmer.sum(-1, keepdim=True), atol=1e-6)


def test_edits_of_one_call_nest():
    kind = build("llama")
    order = []

    def note(name):
        def before(call):
            order.append(f"before {name}")
            return call.change(value=call.value + 1)

        def after(call, output):
            order.append(f"after {name}")
            return output * 2

        return {"before": before, "after": after}

    with torch.no_grad():
        base = kind()
        one = rewrite_attention(kind.model, seen("llama"), layer=1, **note("one"))
        two = rewrite_attention(kind.model, seen("llama"), layer=1, **note("two"))
        both = kind()
        assert order == ["before one", "before two", "after two", "after one"]
        one.undo()
        two_only = kind()
        two.undo()
        assert torch.equal(kind(), base)
        with rewrite_attention(
            kind.model,
            seen("llama"),
            before=lambda call: call.change(value=call.value + 2),
            after=lambda call, output: 4 * output,
            layer=1,
        ):
            assert torch.allclose(kind(), both, atol=1e-12)
        with rewrite_attention(kind.model, seen("llama"), layer=1, **note("two")):
            assert torch.equal(kind(), two_only)


# ---------------------------------------------------------------- refusals


def test_nothing_to_rewrite_is_refused():
    with pytest.raises(EditError, match="before= or after= is needed"):
        rewrite_attention(build("gpt2").model, seen("gpt2"))


def test_a_call_that_is_not_there_is_refused():
    with pytest.raises(EditError, match="no attention call was seen at part='cross' of this model"):
        rewrite_attention(build("gpt2").model, seen("gpt2"), after=center, part="cross")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"before": lambda call: call.query}, "before returned a Tensor; it must return call"),
        ({"before": lambda call: call.change(query=call.query[:, :1])}, "the new query is|shape|size"),
        ({"after": lambda call, output: output[:, :1]}, r"after returned \(3, 1, 9, 8\)"),
        ({"before": lambda call: call.change(logits=call.value)}, "before set logits, which attention in h.0"),
    ],
)
def test_what_does_not_fit_is_said_in_the_forward(options, sentence):
    kind = build("plain")
    with torch.no_grad():
        base = kind()
        with pytest.raises(EditError, match=sentence), rewrite_attention(kind.model, seen("plain"), **options):
            kind()
        assert not edits_in(kind.model)
        assert torch.equal(kind(), base)


def test_an_edit_that_meets_no_kernel_speaks_up():
    kind = build("plain")
    edit = rewrite_attention(kind.model, seen("plain"), after=center)
    for block in kind.model.h:
        block.attn.forward.original = lambda x: x  # the attention is gone

    with edit, pytest.raises(EditError, match=r"attention in h.0.attn cannot be rewritten: no call of a kernel"):
        kind()


def test_the_mask_of_a_kernel_that_takes_none_is_not_changed():
    kind = build("llama")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

    def flash_like(module, query, key, value, attention_mask, **kwargs):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2), None

    TABLE["flash_like"] = flash_like
    try:
        kind.model.config._attn_implementation = "flash_like"
        with torch.no_grad():
            base = kind()
            with rewrite_attention(kind.model, seen("llama"), before=lambda call: call.change(value=2 * call.value)):
                edited = kind()
            with rewrite_attention(kind.model, seen("llama"), after=lambda call, output: 2 * output):
                assert torch.allclose(edited, kind(), atol=1e-12)
            assert not torch.allclose(edited, base, atol=1e-2)
            edit = rewrite_attention(kind.model, seen("llama"), before=lambda call: call.change(causal=False))
            with edit, pytest.raises(EditError, match="the kernel 'flash_like' takes none"):
                kind()
        assert TABLE["flash_like"] is flash_like
    finally:
        del TABLE["flash_like"]
