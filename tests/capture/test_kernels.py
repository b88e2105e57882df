"""Kernels that are not torch's own: dispatched, compiled, registered by a user, or not known at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import TEXT, ids
from plain import Block, PlainGPT, sharp, tokens
from seen import assert_identical, record
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.modeling_utils import AttentionInterface

from fullrank.capture import KernelCall, register_attention
from fullrank.capture.reading import Unreadable
from fullrank.capture.register import reader_of
from fullrank.errors import CaptureError


def repeated(module, key, value):
    groups = module.num_key_value_groups
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def opaque(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention without a softmax in it: nothing to hold on to."""
    key, value = repeated(module, key, value)
    e = (query @ key.mT * scaling).exp().tril()
    return ((e / e.sum(-1, keepdim=True)) @ value).transpose(1, 2).contiguous(), None


def by_softmax(module, query, key, value, attention_mask, scaling, **kwargs):
    key, value = repeated(module, key, value)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    p = (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    return (p @ value).transpose(1, 2).contiguous(), p


def by_sdpa(module, query, key, value, attention_mask, scaling, **kwargs):
    y = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


def read_opaque(args, kwargs, output):
    _, query, key, value, *_ = args
    return KernelCall("opaque", value, value.dtype, query=query, key=key, causal=True, scale=kwargs["scaling"])


@pytest.fixture
def llama():
    model = hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2))
    sharp(model)

    def use(function):
        AttentionInterface.register("a kernel of mine", function)
        model.config._attn_implementation = "a kernel of mine"
        return model

    yield use
    AttentionInterface._global_mapping.pop("a kernel of mine", None)


def run(model):
    with torch.no_grad():
        return model(ids(), use_cache=False)


def test_a_dispatched_function_may_be_called_with_names(llama, monkeypatch):
    model = llama(by_sdpa)
    expected = run(model)
    source = sys.modules[type(model).__module__]

    class ByName:
        def __init__(self, table):
            self.table = table
            self._local_mapping = table._local_mapping

        def __contains__(self, key):
            return key in self.table

        def __getitem__(self, key):
            return self.table[key]

        def get_interface(self, name, default):
            function = self.table.get_interface(name, default)
            return lambda module, query, key, value, mask, **more: function(
                module, query=query, key=key, value=value, attention_mask=mask, **more
            )

    monkeypatch.setattr(source, "ALL_ATTENTION_FUNCTIONS", ByName(source.ALL_ATTENTION_FUNCTIONS))
    keep, _, during = record(model, lambda: run(model))
    assert_identical(expected, during)
    assert [call.layer for call in keep.calls] == [1, 2]


@pytest.mark.parametrize("function", [by_softmax, by_sdpa])
def test_a_registered_function_is_seen_through_what_it_calls(llama, function):
    model = llama(function)
    before = run(model)
    keep, recorder, during = record(model, lambda: run(model))
    assert_identical(before, during)
    assert [(call.layer, call.part, call.causal) for call in keep.calls] == [(1, "self", True), (2, "self", True)]
    assert not recorder.notes


def test_an_unknown_kernel_is_said_and_not_guessed(llama):
    model = llama(opaque)
    before = run(model)
    keep, recorder, during = record(model, lambda: run(model))
    assert_identical(before, during)
    assert not keep.calls
    assert any("register_attention" in note for note in recorder.notes)
    assert set(keep.states("stream", "mid")) == {1, 2}  # that it is attention is known


def test_a_reader_makes_an_unknown_kernel_known(llama):
    model = llama(opaque)
    known = llama(by_sdpa)
    expected, _, _ = record(known, lambda: run(known))
    model = llama(opaque)
    with register_attention(opaque, read_opaque):
        keep, recorder, _ = record(model, lambda: run(model))
    assert reader_of(opaque) is None
    assert recorder.anatomy.stacks[0].name == "decoder"
    for one, other in zip(keep.calls, expected.calls, strict=True):
        assert one.kernel == "opaque"
        assert one.value.shape == (3, 2, 9, 8)
        assert_close(one.attention.dense(), other.attention.dense())


def test_a_reader_for_a_torch_function():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return torch.ops.fullrank_test.attend(q, k, v).transpose(1, 2).flatten(2)

    class MineBlock(Block):
        def __init__(self, width, heads, **options):
            super().__init__(width, heads, **options)
            self.attn = Mine()

    @torch.library.custom_op("fullrank_test::attend", mutates_args=())
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def reader(args, kwargs, output):
        q, k, v = args
        return KernelCall("attend", v, v.dtype, query=q, key=k)

    model = sharp(PlainGPT(block=MineBlock))
    with register_attention(torch.ops.fullrank_test.attend, reader):
        keep, _, _ = record(model, lambda: model(tokens()))
    assert [(call.layer, call.part, call.kernel) for call in keep.calls] == [(n, "self", "attend") for n in (1, 2, 3)]


def test_registering_twice_and_taking_back():
    def other(args, kwargs, output):
        return None

    first = register_attention(opaque, read_opaque)
    second = register_attention(opaque, other)
    assert reader_of(opaque) is other
    second.remove()
    assert reader_of(opaque) is read_opaque
    first.remove()
    assert reader_of(opaque) is None
    with pytest.raises(CaptureError, match="reader='x' cannot be called"):
        register_attention(opaque, "x")


def _in_a_process_of_its_own(code: str) -> None:
    # dynamo's state is process-wide; a compiled test must not reach into the others
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))},
    )


@pytest.mark.slow
def test_a_compiled_model_is_looked_at_without_compilation_and_stays_compiled():
    _in_a_process_of_its_own(
        """
        import torch
        from plain import PlainGPT, sharp, tokens
        from seen import record
        model = sharp(PlainGPT())
        with torch.no_grad():
            eager = model(tokens())
            for way in ("function", "method"):
                compiled = torch.compile(model, backend="eager") if way == "function" else model
                if way == "method":
                    model.compile(backend="eager")
                compiled(tokens())
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                keep, recorder, output = record(compiled, lambda: compiled(tokens()))
                assert torch.equal(output, eager)
                assert [call.layer for call in keep.calls] == [1, 2, 3]
                assert recorder.anatomy.stacks[0].paths == ("h.0", "h.1", "h.2")
                assert any("without compilation" in note for note in recorder.notes)
                compiled(tokens())
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
                assert torch._dynamo.eval_frame._stance.stance == "default"
        """
    )


@pytest.mark.slow
def test_compiled_flex_attention_is_left_alone_and_said():
    _in_a_process_of_its_own(
        """
        import torch, transformers as hf
        from families import TEXT, ids
        from seen import assert_identical, record
        config = hf.LlamaConfig(**TEXT | {"hidden_size": 64}, attn_implementation="flex_attention")
        model = hf.LlamaModel(config).eval()
        graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # traced by dynamo and run without a C++ compiler
        with torch.no_grad(), torch.compiler.set_stance("default", force_backend="eager"):
            run = lambda: model(ids(), use_cache=False)
            before, traced = run(), graphs()
            assert traced > 0
            keep, recorder, during = record(model, run)
            assert graphs() == traced
        assert_identical(before, during)
        assert not keep.calls
        assert list(keep.states()) == [0, 1, 2] and set(keep.states("stream", "mid")) == {1, 2}
        assert any("flex_attention was not observed" in note for note in recorder.notes)
        """
    )


def test_an_operator_whose_reader_cannot_read_a_call_is_said_and_the_forward_goes_on():
    def attend(q, k, v):
        return functional.logsigmoid(q) + v  # any function of torch that is registered

    class Calling(Block):
        def forward(self, x):
            return x + attend(self.ln_1(x), x, x)

    def reader(args, kwargs, output):
        raise Unreadable("it has a mask of its own")

    model, batch = sharp(PlainGPT(block=Calling)), tokens()
    expected = model(batch)
    with register_attention(functional.logsigmoid, reader):
        keep, recorder, output = record(model, lambda: model(batch))
    assert torch.equal(output, expected)
    assert not keep.calls
    assert any("was not read: it has a mask of its own" in note for note in recorder.notes)
