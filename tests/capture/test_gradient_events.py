"""Gradients of states and of attention calls against plain autograd on a copy of the model."""

from __future__ import annotations

import contextlib
import copy
import sys
from dataclasses import dataclass

import pytest
import torch
from families import build
from plain import Block, PlainGPT, sharp, tokens
from seen import Keep as KeepAll
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fullrank.capture import GradientState, Recorder, StreamState, register_attention, survey
from fullrank.capture.calls import KernelCall


class Keep(KeepAll):
    """An observer that keeps every event, and gives gradients by their place."""

    def __init__(self, *needs):
        super().__init__(frozenset({"gradient", *needs}))

    def gradients(self, backward=0):
        return {
            (event.stack, event.layer, event.part, event.which): event.value
            for event in self.events
            if isinstance(event, GradientState) and event.value is not None and event.backward == backward
        }

    def reasons(self):
        return {
            (event.stack, event.layer, event.part, event.which): event.reason
            for event in self.events
            if isinstance(event, GradientState) and event.value is None
        }


def surveyed(model, **batch):
    with torch.no_grad():
        return survey(model, lambda: model(**batch))


def cotangent(state, seed=3):
    return torch.randn(state.shape, generator=torch.Generator().manual_seed(seed)).to(state.dtype)


def watched(model, batch, *, backwards=1, needs=()):
    """Gradients of Σ G ⊙ (last states of stacks that feed no other) as the recorder sees them."""
    keep = Keep(*needs)
    anatomy = surveyed(model, **batch)
    with Recorder(model, [keep], anatomy=anatomy) as recorder:
        model(**batch)
        ends = [end for end in recorder.ends() if not end.into]
        inputs = [p for p in model.parameters() if p.requires_grad] + recorder.watch.starts
        for index in range(backwards):
            torch.autograd.grad(
                [end.value for end in ends],
                inputs,
                [cotangent(end.value, seed=3 + index) for end in ends],
                allow_unused=True,
                retain_graph=index + 1 < backwards,
            )
    return keep, recorder


@dataclass
class Plain:
    """What plain autograd says: states by block path, and (q, k, v, output) of each call in order."""

    states: dict
    calls: list


@contextlib.contextmanager
def eavesdropping(model, calls):
    """Retain gradients of what attention is given and gives, where this model computes it."""

    def heard(function, first, turned):
        def listen(*args, **kwargs):
            names = ("query", "key", "value")
            given = list(args[first : first + 3]) or [kwargs[name] for name in names]
            output = function(*args, **kwargs)
            made = output[0] if isinstance(output, tuple) else output
            for tensor in (*given, made):
                if not tensor.is_leaf:
                    tensor.retain_grad()
            calls.append((*given, (made, turned)))
            return output

        return listen

    with contextlib.ExitStack() as put_back:
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        module = sys.modules[type(model).__module__]
        if implementation == "sdpa" and hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            local = ALL_ATTENTION_FUNCTIONS._local_mapping
            local["sdpa"] = heard(ALL_ATTENTION_FUNCTIONS["sdpa"], 1, True)
            put_back.callback(local.pop, "sdpa")
        elif hasattr(module, "eager_attention_forward"):
            put_back.callback(setattr, module, "eager_attention_forward", module.eager_attention_forward)
            module.eager_attention_forward = heard(module.eager_attention_forward, 1, True)
        else:
            kept = functional.scaled_dot_product_attention
            put_back.callback(setattr, functional, "scaled_dot_product_attention", kept)
            functional.scaled_dot_product_attention = heard(kept, 0, False)
        yield


def plain(model, batch, anatomy, last):
    """The same gradients on a copy, by retained gradients and `.backward()`."""
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    states, calls = {}, []

    def retain(key, tensor):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
        states[key] = tensor

    def first(value):
        return value if isinstance(value, torch.Tensor) else value[0]

    handles = []
    for stack in anatomy.stacks:
        for layer, path in enumerate(stack.paths, 1):
            handles.append(
                modules[path].register_forward_hook(lambda m, a, out, key=(stack.name, layer): retain(key, first(out)))
            )
        handles.append(
            modules[stack.paths[0]].register_forward_pre_hook(
                lambda m, args, kwargs, key=(stack.name, 0): retain(key, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    with eavesdropping(twin, calls):
        twin(**batch)
    ends = [states[stack.name, len(stack.paths)] for stack in anatomy.stacks if stack.name in last]
    sum((end * cotangent(end)).sum() for end in ends).backward()
    for handle in handles:
        handle.remove()
    return Plain({key: state.grad for key, state in states.items()}, calls)


FAMILIES = ["gpt2", "llama", "bert", "t5", "gemma2", "falcon", "vit", "llama_padded", "whisper", "llama_eager"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_plain_autograd(family):
    case = build(family)
    keep, recorder = watched(case.model, case.batch)
    seen = keep.gradients()
    last = [recorder.anatomy.stacks[-1].name]
    found = plain(case.model, case.batch, recorder.anatomy, last)
    for (stack, layer), gradient in found.states.items():
        assert_close(seen[stack, layer, "out", "state"], gradient, atol=1e-5, rtol=1e-5)
    places = [
        (stack.name, layer, part)
        for stack in recorder.anatomy.stacks
        for layer, parts in enumerate(stack.calls, 1)
        for part in parts
    ]
    assert len(places) == len(found.calls)
    for place, (q, k, v, (output, turned)) in zip(places, found.calls, strict=True):
        for which, tensor in (("q", q), ("k", k), ("v", v)):
            gradient = seen[(*place, which)]
            if case.kernel == "softmax" and gradient.shape != tensor.shape:  # factors have their heads repeated
                group = gradient.shape[1] // tensor.shape[1]
                gradient = gradient.unflatten(1, (tensor.shape[1], group)).sum(2)
            assert gradient.shape == tensor.shape
            assert_close(gradient, tensor.grad, atol=1e-5, rtol=1e-5)
        expected = output.grad.transpose(1, 2) if turned else output.grad
        assert_close(seen[(*place, "output")], expected, atol=1e-5, rtol=1e-5)
    assert not keep.reasons()
    assert len(seen) == len(found.states) + 4 * len(found.calls)


@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_of_writing_attention_have_the_same_gradients(fused):
    keep, _ = watched(sharp(PlainGPT(fused=fused)).double(), {"ids": tokens()})
    model = sharp(PlainGPT(fused=fused)).double()
    x = model.wte(tokens()) + model.wpe(torch.arange(9))
    states, parts = [x], []
    for block in model.h:
        attention, y = block.attn, block.ln_1(x)
        q, k, v = (
            z.view(*z.shape[:2], attention.heads, -1).transpose(1, 2)
            for z in attention.c_attn(y).split(y.shape[-1], dim=2)
        )
        s = (q @ k.mT) / q.shape[-1] ** 0.5
        s = s.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
        output = s.softmax(-1) @ v
        parts.append({"q": q, "k": k, "v": v, "output": output})
        x = x + attention.c_proj(output.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
        states.append(x)
    names = list(parts[0])
    wanted = [*states, *(part[name] for part in parts for name in names)]
    expected = torch.autograd.grad(x, wanted, cotangent(x))
    seen = keep.gradients()
    for layer in range(len(states)):
        assert_close(seen["decoder", layer, "out", "state"], expected[layer], atol=1e-5, rtol=1e-5)
    rest = iter(expected[len(states) :])
    for layer in range(1, len(states)):
        for name in names:
            assert_close(seen["decoder", layer, "self", name], next(rest), atol=1e-5, rtol=1e-5)


def test_the_state_between_attention_and_mlp_has_its_gradient():
    model = sharp(PlainGPT()).double()
    keep, _ = watched(model, {"ids": tokens()}, needs=("stream", "mid"))
    mids = {e.layer: e.value for e in keep.events if isinstance(e, StreamState) and e.part == "mid"}
    for layer in (1, 2, 3):
        mid = mids[layer].clone().requires_grad_()
        x = mid
        for index, block in enumerate(model.h[layer - 1 :]):
            x = x + block.attn(block.ln_1(x)) if index else x
            x = x + block.mlp(block.ln_2(x))
        (expected,) = torch.autograd.grad(x, mid, cotangent(x))
        assert_close(keep.gradients()["decoder", layer, "mid", "state"], expected, atol=1e-5, rtol=1e-5)


class FlatBlock(Block):
    """Adds its attention to a stream without an axis of sequences, as blocks with routers do."""

    def forward(self, x):
        y = self.attn(self.ln_1(x))
        flat = x.view(-1, x.shape[-1]) + y.view(-1, x.shape[-1])
        return (flat + self.mlp(self.ln_2(flat))).view(x.shape)


def test_a_state_that_was_flattened_has_its_gradient_by_sequence():
    model = sharp(PlainGPT(block=FlatBlock)).double()
    keep, _ = watched(model, {"ids": tokens()}, needs=("stream", "mid"))
    mids = {e.layer: e.value for e in keep.events if isinstance(e, StreamState) and e.part == "mid"}
    mid = mids[3].clone().requires_grad_()
    x = mid + model.h[2].mlp(model.h[2].ln_2(mid))
    (expected,) = torch.autograd.grad(x, mid, cotangent(x))
    assert mid.shape == (*tokens().shape, 32)
    assert_close(keep.gradients()["decoder", 3, "mid", "state"], expected, atol=1e-5, rtol=1e-5)


class Encoder(nn.Module):
    """Torch's own encoder over a stream that nothing trained comes before."""

    def __init__(self, *, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_encoder_and_a_first_state_that_is_the_input(batch_first):
    model = sharp(Encoder(batch_first=batch_first)).eval()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    keep, _ = watched(model, {"x": x if batch_first else x.transpose(0, 1).contiguous()})
    assert not x.requires_grad
    y = (x if batch_first else x.transpose(0, 1)).clone().requires_grad_()
    out = model(y)
    G = cotangent(torch.empty(out.shape))
    (expected,) = torch.autograd.grad(out, y, G)
    turned = expected if batch_first else expected.transpose(0, 1)
    assert_close(keep.gradients()["encoder", 0, "out", "state"], turned, atol=1e-5, rtol=1e-5)
    assert keep.gradients()["encoder", 2, "self", "q"].shape == (3, 2, 5, 8)
    assert keep.gradients()["encoder", 1, "self", "output"].shape == (3, 2, 5, 8)


class WithMaps(nn.Module):
    """`nn.MultiheadAttention` that returns its map: it makes logits by a product and softmaxes them itself."""

    def __init__(self, *, need_weights):
        super().__init__()
        self.blocks = nn.ModuleList(WithMapsBlock(need_weights) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WithMapsBlock(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


def test_multihead_attention_with_its_map_has_the_gradients_of_the_one_without():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    one, other = (watched(sharp(WithMaps(need_weights=need)).eval(), {"x": x})[0] for need in (True, False))
    with_map, without = one.gradients(), other.gradients()
    assert with_map.keys() == without.keys()
    assert {key[-1] for key in with_map} >= {"q", "k", "v", "output"}
    scale = 8**0.5  # the queries that entered the product were scaled before
    for key, gradient in with_map.items():
        expected = without[key] * scale if key[-1] == "q" else without[key]
        assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_two_backwards_give_two_sets_of_events():
    case = build("gpt2")
    keep, _ = watched(case.model, case.batch, backwards=2)
    once, _ = watched(case.model, case.batch)
    first, second = keep.gradients(0), keep.gradients(1)
    assert first.keys() == second.keys() == once.gradients().keys()
    for key, gradient in once.gradients().items():
        assert torch.equal(first[key], gradient)
        assert not torch.equal(second[key], gradient)


def test_outputs_are_the_same_bit_for_bit_and_no_hook_stays():
    case = build("llama")
    before = case.model(**case.batch).last_hidden_state
    keep = Keep("stream", "mid", "read", "attention")
    with Recorder(case.model, [keep], anatomy=surveyed(case.model, **case.batch)):
        during = case.model(**case.batch).last_hidden_state
    assert torch.equal(before, during)
    count = len(keep.events)
    during.sum().backward()  # after the recorder has been left
    assert len(keep.events) == count
    assert set(keep.reasons().values()) == {"no gradient reached it"}
    for module in case.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_no_hooks_are_put_where_gradients_are_off_or_not_wanted():
    case = build("gpt2")
    anatomy = surveyed(case.model, **case.batch)
    keep, states = Keep(), Keep()
    states.needs = frozenset({"stream"})
    with Recorder(case.model, [keep], anatomy=anatomy) as recorder, torch.no_grad():
        case.model(**case.batch)
        assert recorder.ends() == []
    assert keep.events == []
    with Recorder(case.model, [states], anatomy=anatomy) as recorder:
        case.model(**case.batch).last_hidden_state.sum().backward()
    assert not any(isinstance(event, GradientState) for event in states.events)


class Checkpointed(nn.Module):
    """Blocks that are run again in the backward."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.inner = sharp(PlainGPT())
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.inner.wte(ids) + self.inner.wpe(torch.arange(ids.shape[1]))
        for block in self.inner.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.inner.ln_f(x) if hasattr(self.inner, "ln_f") else x


def test_activation_checkpointing_gives_the_gradients_of_the_plain_model():
    model = Checkpointed(reentrant=False)
    keep, _ = watched(model, {"ids": tokens()}, needs=("stream", "mid", "read", "attention"))
    expected, _ = watched(model.inner, {"ids": tokens()}, needs=("stream", "mid", "read", "attention"))
    assert keep.gradients().keys() == expected.gradients().keys()
    for key, gradient in expected.gradients().items():
        assert_close(keep.gradients()[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the survey runs without gradients
def test_reentrant_checkpointing_is_answered_with_the_reason():
    model = Checkpointed(reentrant=True)
    keep = Keep("stream", "attention")
    with Recorder(model, [keep], anatomy=surveyed(model, ids=tokens())):
        model(tokens()).sum().backward()
    hidden = keep.reasons()
    assert {key[2:] for key in hidden} >= {("self", "q"), ("self", "k"), ("self", "v"), ("self", "output")}
    assert all("reentrant activation checkpointing" in reason for reason in hidden.values())
    assert ("decoder", 0, "out", "state") in keep.gradients()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_those_that_the_model_has(dtype):
    model = sharp(PlainGPT()).to(dtype)
    keep, _ = watched(model, {"ids": tokens()})
    gradients = keep.gradients()
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    exact, _ = watched(model.double(), {"ids": tokens()})
    for layer in range(4):
        key = ("decoder", layer, "out", "state")
        difference = gradients[key].double() - exact.gradients()[key]
        assert difference.norm() < 0.05 * exact.gradients()[key].norm()


class TwoProducts(nn.Module):
    """Attention whose logits are the sum of two products of the stream with itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(TwoProductsBlock() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TwoProductsBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        q, k, r, p, v = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in self.maps)
        logits = q @ k.mT + r @ p.mT
        return x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_logits_that_are_a_sum_of_products_are_no_guess():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    keep, _ = watched(TwoProducts(), {"x": x})
    assert {key[-1]: reason for key, reason in keep.reasons().items()} == {
        "q": "its logits are the sum of several products",
        "k": "its logits are the sum of several products",
    }
    assert {key[-1] for key in keep.gradients()} == {"state", "v", "output"}


@torch.library.custom_op("fullrank_tests::attention_of_gradients", mutates_args=())
def strange_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).contiguous()


@strange_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        q, k, v = (x.transpose(1, 2) for x in given)
        output = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
    return torch.autograd.grad(output, given, gradient)


strange_attention.register_autograd(_backward, setup_context=_keep_inputs)


class Registered(nn.Module):
    """A kernel of one's own with tokens before heads, given slices of one fused tensor."""

    def __init__(self, *, known):
        super().__init__()
        self.blocks = nn.ModuleList(RegisteredBlock(known=known) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class RegisteredBlock(nn.Module):
    def __init__(self, *, known):
        super().__init__()
        self.known = known
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        if self.known:
            y = functional.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2)
        else:
            y = torch.ops.fullrank_tests.attention_of_gradients(q, k, v)
        return x + y.flatten(2)


def test_a_registered_kernel_has_the_gradients_of_the_known_one():
    def read(args, kwargs, output):
        q, k, v = (x.transpose(1, 2) for x in args)
        return KernelCall(kernel="strange", query=q, key=k, value=v, dtype=output.dtype)

    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = watched(sharp(Registered(known=True)), {"x": x})[0].gradients()
    with register_attention(torch.ops.fullrank_tests.attention_of_gradients, read):
        seen = watched(sharp(Registered(known=False)), {"x": x})[0].gradients()
    assert seen.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close(seen[key], gradient, atol=1e-5, rtol=1e-5)
