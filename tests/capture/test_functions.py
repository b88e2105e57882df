"""Flash-attention and other plain functions, by stand-ins of the same signatures: seen where they are called."""

from __future__ import annotations

import sys
import threading

import kernels
import pytest
import torch
import transformers as hf
from calling import GROUPS, HEADS, LENGTHS, TOKENS, Calling, assert_read, looked_at
from family import TEXT, ids
from kernels import FLASH, module_of
from plain import sharp, states
from seen import Keep, assert_identical, record
from torch import nn
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fullrank
from fullrank.capture import KernelCall, Recorder, register_attention, survey
from fullrank.edit import rewrite_attention


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """The package is loaded, as it is in a program that uses it."""
    monkeypatch.setitem(sys.modules, "flash_attn", module_of("flash_attn", *FLASH))
    here = sys.modules[__name__]
    for function in FLASH:  # as `from … import …` does
        monkeypatch.setattr(here, function.__name__, function, raising=False)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scaled": {"softmax_scale": 0.7, "dropout_p": 0.0},
    "window": {"window_size": (2, 2)},
    "causal window": {"causal": True, "window_size": (2, 0)},
    "causal, open to the right": {"causal": True, "window_size": (2, -1)},
    "lopsided window": {"window_size": (1, 3)},
    "open to the left": {"window_size": (-1, 1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0]), "causal": True},
    "alibi both ways": {"alibi_slopes": torch.rand(3, 4, generator=torch.Generator().manual_seed(0))},
    "with its sums": {"return_attn_probs": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_flash_attention_is_read_as_it_computes(options, groups):
    def attention(q, k, v):
        out = flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    keep, recorder, outputs = looked_at(attention, groups=groups)
    assert_read(keep, outputs)
    causal = bool(options.get("causal"))
    assert all(call.causal == causal and call.kernel == "flash_attn_func" for call in keep.calls)
    assert recorder.anatomy.stacks[0].name == ("decoder" if causal else "encoder")
    assert all(call.attention.shape == (3, HEADS, TOKENS, TOKENS) for call in keep.calls)


def test_positional_arguments_are_told_apart_by_the_signature():
    keep, _, outputs = looked_at(lambda q, k, v: flash_attn_func(q, k, v, 0.0, 0.5, True, (3, 0)))
    assert_read(keep, outputs)
    assert keep.calls[0].causal


def test_fewer_queries_than_keys_are_aligned_to_the_bottom_right():
    def attention(q, k, v):
        out = flash_attn_func(q[:, 2:], k, v, causal=True, window_size=(3, 0))
        return torch.cat([q[:, :2], out], 1)

    keep, _, outputs = looked_at(attention)
    for call, output in zip(keep.calls, outputs, strict=True):
        assert call.attention.shape[2:] == (TOKENS - 2, TOKENS)
        assert_close(call.attention.matmat(call.value).transpose(1, 2), output[:, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"])
def test_packed_queries_keys_and_values(name):
    def attention(q, k, v):
        if name == "flash_attn_qkvpacked_func":
            return flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True)
        return flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True)

    keep, _, outputs = looked_at(attention)
    assert_read(keep, outputs)
    assert {call.kernel for call in keep.calls} == {name}


ENDS = torch.tensor([0, 4, 5, 11], dtype=torch.int32)


def _apart(x):
    return list(x.split(LENGTHS))


@pytest.mark.parametrize("options", [o for n, o in OPTIONS.items() if n != "with its sums"])
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_laid_end_to_end_are_sequences_again(options, packed):
    def attention(q, k, v):
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        if packed:
            out = flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), ENDS, 6, **options)
        else:
            out = flash_attn_varlen_func(q, k, v, ENDS, ENDS, 6, 6, **options)
        return out.unsqueeze(0)

    keep, _, outputs = looked_at(attention, states(1, sum(LENGTHS)))
    assert len(keep.calls) == 2
    for call, output in zip(keep.calls, outputs, strict=True):
        assert call.attention.shape == (3, HEADS, 6, 6)
        assert call.real_keys.sum(-1).tolist() == call.real_queries.sum(-1).tolist() == LENGTHS
        recomputed = call.attention.matmat(call.value).transpose(1, 2)
        for row, expected, length in zip(recomputed, _apart(output[0]), LENGTHS, strict=True):
            assert_close(row[:length], expected, atol=1e-5, rtol=1e-5)
        visible = call.attention.visible_count()
        assert not bool(visible[1, :, 1:].any())  # no query beyond a sequence's end sees anything


def test_sequences_with_fewer_queries_than_keys_laid_end_to_end():
    of_queries = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    kept = torch.tensor([2, 3, 4, 8, 9, 10])  # the last tokens of each

    def attention(q, k, v):
        parts = (q[0, kept], k[0], v[0], of_queries, ENDS, 3, 6)
        out = flash_attn_varlen_func(*parts, causal=True, alibi_slopes=torch.tensor([0.5, 0.2, 0.1, 1.0]))
        whole = q.clone()
        whole[0, kept] = out
        return whole

    keep, _, outputs = looked_at(attention, states(1, sum(LENGTHS)))
    for call, output in zip(keep.calls, outputs, strict=True):
        recomputed = call.attention.matmat(call.value).transpose(1, 2)
        for row, expected, length in zip(recomputed, output[0, kept].split([2, 1, 3]), [2, 1, 3], strict=True):
            assert_close(row[:length], expected, atol=1e-5, rtol=1e-5)


def test_a_call_that_cannot_be_read_is_said():
    def attention(q, k, v):
        return flash_attn_with_kvcache(q, k.clone(), v.clone(), k, v, causal=True)

    keep, recorder, _ = looked_at(attention)
    assert not keep.calls
    assert any("flash_attn_with_kvcache was not read: it writes new keys into a cache" in n for n in recorder.notes)


def test_a_table_of_pages_is_said_and_the_forward_goes_on():
    pages = torch.zeros(3, 2, dtype=torch.int32)

    def attention(q, k, v):
        return flash_attn_varlen_func(q[0], k[0], v[0], ENDS, ENDS, 6, 6, causal=True, block_table=pages)[None]

    keep, recorder, _ = looked_at(attention, states(1, sum(LENGTHS)))
    assert not keep.calls
    assert any("flash_attn_varlen_func was not read" in note and "page" in note for note in recorder.notes)


def test_a_function_that_a_module_of_the_model_holds_is_found_and_put_back():
    kernel = kernels.flash_attn_func
    model = sharp(nn.Sequential(Calling(kernel), Calling(kernel)))
    keep = Keep()
    with Recorder(model, [keep]), torch.no_grad():
        model(states(2, TOKENS))
        assert model[0].attention is not kernel
        assert kernels.flash_attn_func is not kernel
    assert [call.kernel for call in keep.calls] == ["flash_attn_func"] * 2
    assert model[0].attention is kernels.flash_attn_func is kernel
    assert sys.modules["flash_attn"].flash_attn_func is kernel


def test_functions_are_put_back_after_an_exception():
    def failing(q, k, v):
        flash_attn_func(q, k, v)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        looked_at(failing)
    model = sharp(nn.Sequential(Calling(failing), Calling(failing)))
    with pytest.raises(KeyboardInterrupt):
        record(model, lambda: model(states(2, TOKENS)))
    assert sys.modules["flash_attn"].flash_attn_func is kernels.flash_attn_func
    assert vars(sys.modules[__name__])["flash_attn_func"] is kernels.flash_attn_func


def importing_late(q, k, v):
    """Keeps the kernel where it finds it, as code does that loads its packages late."""
    here = sys.modules[__name__]
    here.found_late = sys.modules["flash_attn"].flash_attn_func
    return here.found_late(q, k, v)


def test_a_function_that_was_taken_over_while_a_model_was_looked_at_is_put_back_too(monkeypatch):
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "found_late", None, raising=False)
    model, keep = sharp(nn.Sequential(Calling(importing_late), Calling(importing_late))), Keep()
    with Recorder(model, [keep]), torch.no_grad():
        model(states(2, TOKENS))
    assert len(keep.calls) == 2
    assert here.found_late is kernels.flash_attn_func


def test_two_threads_that_look_at_two_models_leave_all_functions_as_they_were():
    kernel = kernels.flash_attn_func
    one, other = (sharp(nn.Sequential(Calling(kernel), Calling(kernel))) for _ in range(2))
    entered, left = threading.Event(), threading.Event()
    keeps = Keep(), Keep()

    def beside():
        with Recorder(other, [keeps[1]]), torch.no_grad():
            other(states(2, TOKENS))
            entered.set()
            left.wait(30)
            other(states(2, TOKENS))

    thread = threading.Thread(target=beside)
    with Recorder(one, [keeps[0]]), torch.no_grad():
        one(states(2, TOKENS))
        thread.start()
        assert entered.wait(30)
        one(states(2, TOKENS))
    left.set()
    thread.join()
    assert [len(keep.calls) for keep in keeps] == [4, 4]
    assert one[0].attention is other[0].attention is kernel
    assert sys.modules["flash_attn"].flash_attn_func is kernels.flash_attn_func is kernel


def test_two_threads_that_look_at_two_models_of_one_table_leave_it_as_it_was():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = (sharp(hf.MistralModel(hf.MistralConfig(**TEXT, num_key_value_heads=2))) for _ in range(2))
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    entered, left = threading.Event(), threading.Event()
    keeps = Keep(), Keep()

    def beside():
        with Recorder(other, [keeps[1]]), torch.no_grad():
            other(ids(2), use_cache=False)
            entered.set()
            left.wait(30)
            other(ids(2), use_cache=False)

    thread = threading.Thread(target=beside)
    with Recorder(one, [keeps[0]]), torch.no_grad():
        one(ids(2), use_cache=False)
        thread.start()
        assert entered.wait(30)
        one(ids(2), use_cache=False)
    left.set()
    thread.join()
    assert [len(keep.calls) for keep in keeps] == [4, 4]
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before


def test_an_edit_that_is_made_while_a_model_is_looked_at_outlives_the_look(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_attention_forward)
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharp(hf.MistralModel(config)).eval()
    config._attn_implementation = "flash_attention_2"

    def forward():
        with torch.no_grad():
            return model(ids(2), use_cache=False).last_hidden_state

    heads = []

    def none(call, output):
        heads.append(call.key.shape[1])
        return 0 * output

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    plain, anatomy = forward(), survey(model, forward)
    with Recorder(model, [Keep()], anatomy=anatomy):
        edit = rewrite_attention(model, anatomy, after=none, layer=1)
        inside = forward()
    outside = forward()
    edit.undo()
    assert torch.equal(inside, outside)
    assert heads == [2, 2]  # the dispatched call, and not what happens inside of it
    assert not torch.equal(plain, outside)
    assert torch.equal(plain, forward())
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before


def test_a_plain_function_of_ones_own_can_be_named():
    def reader(args, kwargs, output):
        q, k, v = (x.transpose(1, 2) for x in args)
        return KernelCall("mine", v, output.dtype, query=q, key=k)

    block = Calling(own_kernel)
    with register_attention(own_kernel, reader):
        model = sharp(nn.Sequential(block, Calling(own_kernel)))
        keep, _, _ = record(model, lambda: model(states(2, TOKENS)))
    assert [call.kernel for call in keep.calls] == ["mine", "mine"]
    assert block.attention is own_kernel


def own_kernel(q, k, v):
    return kernels.flash_attn_func(q, k, v)


def test_such_a_model_is_examined_in_one_call():
    model = sharp(nn.Sequential(Calling(kernels.flash_attn_func), Calling(kernels.flash_attn_func)))
    report = fullrank.examine(model, states(2, 40))
    assert {row.layer for row in report.rows if row.metric == "normalized_entropy"} == {1, 2}


# ---------------------------------------------------------------- the interface of Hugging Face


def flash_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What is registered there: other names, (batch, heads, tokens, width), a padding mask of two dimensions."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = kwargs.get("sliding_window")
    size = (-1, -1) if window is None or k.shape[1] <= window else (window - 1, window - 1)
    options = {"softmax_scale": scaling, "causal": module.is_causal, "window_size": size}
    options["softcap"] = kwargs.get("softcap") or 0.0
    positions = kwargs.get("position_ids")
    if attention_mask is not None:
        out = torch.zeros_like(q)
        for b, real in enumerate(attention_mask.bool()):
            out[b, real] = kernels.flash_attn_func(*(x[b : b + 1, real] for x in (q, k, v)), **options)[0]
        return out, None
    starts = (positions[0] == 0).nonzero().flatten().tolist() if positions is not None and q.shape[0] == 1 else [0]
    parts = zip(starts, [*starts[1:], q.shape[1]], strict=True)
    return torch.cat([kernels.flash_attn_func(*(x[:, a:b] for x in (q, k, v)), **options) for a, b in parts], 1), None


PLAIN = {"attention_mask": None}
PADDED = {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [1] * 7 + [0] * 2])}


@pytest.mark.parametrize("key", ["flash_attention_2", "flash_attention_3", "somebody/kernel"])
@pytest.mark.parametrize("batch", ["plain", "left and right padding", "packed"])
def test_the_flash_keys_of_hugging_face(key, batch, monkeypatch):
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharp(hf.MistralModel(config))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, key, flash_attention_forward)
    if key == "somebody/kernel":
        masks = hf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        monkeypatch.setitem(type(masks)._global_mapping, key, masks["flash_attention_2"])
    config._attn_implementation = key
    given = {"plain": PLAIN, "left and right padding": PADDED}.get(batch, {})
    tokens = ids(3) if batch != "packed" else ids(1, 9)
    if batch == "packed":
        given = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    outputs = []
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))

    def run():
        outputs.clear()
        with torch.no_grad():
            return model(tokens, use_cache=False, **given)

    before = run()
    keep, _, during = record(model, run)
    assert_identical(before, during)
    assert ALL_ATTENTION_FUNCTIONS[key] is flash_attention_forward
    assert [(call.layer, call.kernel, call.causal) for call in keep.calls] == [
        (1, "flash attention", True),
        (2, "flash attention", True),
    ]
    for call, output in zip(keep.calls, outputs, strict=True):
        recomputed = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        real = torch.ones(tokens.shape, dtype=torch.bool) if call.real_queries is None else call.real_queries
        assert_close(recomputed[real], output[real], atol=1e-5, rtol=1e-5)
        if batch == "left and right padding":
            assert torch.equal(real, PADDED["attention_mask"].bool())
        if batch == "packed":
            assert call.attention.visible_count()[0, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 4]


# ---------------------------------------------------------------- custom operators


@torch.library.custom_op("fullrank_functions::own", mutates_args=())
def own_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(sequences, tokens, heads, width)."""
    return kernels.flash_attn_func(q, k, v)


@pytest.mark.parametrize(
    "named",
    [own_operator, torch.ops.fullrank_functions.own, torch.ops.fullrank_functions.own.default],
    ids=["definition", "packet", "overload"],
)
@pytest.mark.parametrize("called", ["packet", "overload"])
def test_a_custom_operator_is_found_by_any_of_its_names(named, called):
    def reader(args, kwargs, output):
        q, k, v = (x.transpose(1, 2) for x in args)
        return KernelCall("own", v, output.dtype, query=q, key=k)

    operator = torch.ops.fullrank_functions.own
    with register_attention(named, reader):
        keep, _, outputs = looked_at(operator if called == "packet" else operator.default)
    assert_read(keep, outputs)
