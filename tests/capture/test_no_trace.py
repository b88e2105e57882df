"""Looking leaves no trace: not on the model, not on the process, and not when it ends in the middle."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref

import pytest
import torch
from families import build
from plain import Block, PlainGPT, sharp, states, tokens
from seen import ALL, Keep, record
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fullrank.capture import Recorder, survey, undisturbed
from untouched import changes, everything

WAYS = ("normally", "observer fails", "observer is interrupted", "model fails", "model is interrupted")


class Interrupting(Keep):
    """Raises at the n-th event."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        super().__init__()
        self.error, self.at = error, at

    def see(self, event):
        super().see(event)
        if len(self.events) == self.at:
            raise self.error


class NoisyGPT(PlainGPT):
    """Everything that a forward can move: running statistics, spectral norm vectors, dropout, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(32)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.fail: BaseException | None = None

    def forward(self, ids):
        self.count += 1  # even in evaluation
        self.cache = torch.ones(ids.shape[1])
        x = self.wte(ids)
        for n, block in enumerate(self.h):
            if n == 2 and self.fail is not None:
                raise self.fail
            x = block(x)
        return self.linear(self.dropout(self.batch_norm(x.mT).mT)) + torch.rand(1)


def noisy() -> NoisyGPT:
    torch.manual_seed(0)
    model = NoisyGPT()
    model(tokens()).sum().backward()
    model.train()
    model.h[1].eval()  # a frozen submodule among training ones
    model.h[1].requires_grad_(False)
    return model


def interrupted(way: str, model: NoisyGPT) -> tuple[Keep, type[BaseException] | None]:
    error: BaseException = KeyboardInterrupt() if "interrupted" in way else RuntimeError("in the middle")
    if "model" in way:
        model.fail = error
    keep = Interrupting(error) if "observer" in way else Keep()
    return keep, None if way == "normally" else type(error)


def raises(expected: type[BaseException] | None):
    return contextlib.nullcontext() if expected is None else pytest.raises(expected)


@pytest.mark.parametrize("way", WAYS)
def test_undisturbed_puts_back_what_evaluation_moves(way):
    model = noisy()
    anatomy = survey(model, lambda: model(tokens()))
    before = everything(model)
    keep, expected = interrupted(way, model)
    with raises(expected), undisturbed(model), Recorder(model, [keep], anatomy=anatomy):
        assert not model.training
        assert not torch.is_grad_enabled()
        warnings.simplefilter("ignore")
        model(tokens())
    assert keep.events
    assert not changes(before, everything(model))


@pytest.mark.parametrize("way", WAYS)
def test_the_recorder_alone_puts_back_the_process(way):
    model = noisy().eval()
    anatomy = survey(model, lambda: model(tokens()))
    keep, expected = interrupted(way, model)
    before = everything(model)
    random = torch.get_rng_state()
    with raises(expected), Recorder(model, [keep], anatomy=anatomy):
        model(tokens())
    after = everything(model)
    moved_by_the_model = {"random", "values", "buffers"}
    assert set(changes(before, after)) <= moved_by_the_model
    if way == "normally":
        torch.set_rng_state(random)
        torch.rand(1)
        assert torch.equal(torch.get_rng_state(), after["random"])  # the model drew one number, the recorder none


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2", "t5", "swin"])
@pytest.mark.parametrize("way", ["normally", "observer fails", "observer is interrupted"])
def test_hugging_face_models_and_their_dispatch_table_are_left_alone(family, way):
    case = build(family)
    case.model.train()
    case.model.base_model.requires_grad_(False)
    mine = object()
    ALL_ATTENTION_FUNCTIONS["a kernel of mine"] = mine
    before = everything(case.model)
    expected = {"observer fails": RuntimeError, "observer is interrupted": KeyboardInterrupt}.get(way)
    keep = Keep() if expected is None else Interrupting(expected("in the middle"))
    try:
        with raises(expected), undisturbed(case.model):
            anatomy = survey(case.model, case.run)
            with Recorder(case.model, [keep], anatomy=anatomy):
                case.run()
        assert len(keep.events) >= 3
        assert not changes(before, everything(case.model))
    finally:
        del ALL_ATTENTION_FUNCTIONS["a kernel of mine"]


def test_an_override_found_in_the_dispatch_table_is_called_and_put_back():
    case = build("llama")
    calls = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        keep, _, _ = record(case.model, case.run)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert len(calls) == 4  # two layers, surveyed and recorded
        assert len(keep.calls) == 2
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_another_model_that_runs_meanwhile_is_not_seen():
    case, other = build("llama"), build("gpt2")
    keep = Keep()
    anatomy = survey(case.model, case.run)
    with Recorder(case.model, [keep], anatomy=anatomy):
        other.run()
        assert not keep.events
        case.run()
    assert {event.path.split(".")[0] for event in keep.events} == {"layers"}


def test_nothing_is_attached_that_no_observer_needs():
    model = sharp(PlainGPT())
    anatomy = survey(model, lambda: model(tokens()))
    keep = Keep(frozenset({"stream"}))
    with Recorder(model, [keep], anatomy=anatomy):
        assert torch._C._len_torch_function_stack() == 0
        assert sum(len(module._forward_hooks) for module in model.modules()) == 3
        model(tokens())
    assert {event.site for event in keep.events} == {"stream"}
    assert [event.layer for event in keep.events] == [0, 1, 2, 3]


def test_observers_are_not_seen_and_run_without_gradients():
    class Meddling(Keep):
        def see(self, event):
            super().see(event)
            assert not torch.is_grad_enabled()
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
            torch.softmax(x, -1) @ x  # would look like attention
            nn.functional.scaled_dot_product_attention(x, x, x)

    model = sharp(PlainGPT())
    keep = Meddling()
    anatomy = survey(model, lambda: model(tokens()))
    with Recorder(model, [keep], anatomy=anatomy):
        loss = model(tokens()).sum()
    assert len(keep.calls) == 3
    assert loss.requires_grad
    assert not any(event.value is not None and event.value.requires_grad for event in keep.events)


def test_inference_mode():
    model = sharp(PlainGPT())
    with torch.inference_mode():
        before = model(tokens())
        keep, _, during = record(model, lambda: model(tokens()))
    assert torch.equal(before, during)
    assert set(keep.states("stream", "mid")) == {1, 2, 3}


def test_events_of_one_forward_are_the_same_in_training_and_gradients_too():
    model = sharp(PlainGPT())
    model(tokens()).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    anatomy = survey(model, lambda: model(tokens()))
    keep = Keep(ALL)
    with Recorder(model, [keep], anatomy=anatomy):
        model(tokens()).square().sum().backward()
    for before, parameter in zip(plain, model.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)
    assert len(keep.calls) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_backward_is_not_seen_again(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(PlainGPT):
        def forward(self, ids):
            x = self.wte(ids)
            for block in self.h:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = sharp(Checkpointed())
    model(tokens()).square().sum().backward()
    plain = [p.grad.clone() for p in model.h.parameters()]
    model.zero_grad()
    anatomy = survey(model, lambda: PlainGPT.forward(model, tokens()))
    keep = Keep()
    with Recorder(model, [keep], anatomy=anatomy):
        model(tokens()).square().sum().backward()
    assert [event.layer for event in keep.calls] == [1, 2, 3]
    assert list(keep.states()) == [0, 1, 2, 3]
    for before, parameter in zip(plain, model.h.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)


def test_fast_path_of_nn_transformer_encoder_comes_back():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        fast = model(states())
        record(model, lambda: model(states()))
        assert torch.equal(fast, model(states()))


@pytest.mark.parametrize("needs", [{"mid"}, {"attention"}])
def test_no_tensor_of_a_block_outlives_it(needs):
    """A softmax that meets no values, and every state, are let go of at the end of their block."""
    alive: list[weakref.ref] = []

    class Gate(nn.Module):
        def forward(self, x):
            gate = x * 2
            alive.append(weakref.ref(gate))
            return x * gate.softmax(-1).amax(-1, keepdim=True)

    class GatedBlock(Block):
        def __init__(self, width, heads, **options):
            super().__init__(width, heads, **options)
            self.mlp = Gate()

        def forward(self, x):
            assert sum(ref() is not None for ref in alive) == 0
            return super().forward(x)

    model = sharp(PlainGPT(block=GatedBlock, fused=False))

    class Reduce(Keep):
        def see(self, event):
            self.count = getattr(self, "count", 0) + 1

    with torch.no_grad():
        anatomy = survey(model, lambda: model(tokens()))
        assert len(alive) == 3
        observer = Reduce(frozenset(needs))
        with Recorder(model, [observer], anatomy=anatomy):
            model(tokens())
    assert len(alive) == 6
    assert observer.count == 3


def test_switches_of_the_process_are_put_back_by_the_last_of_two_threads():
    import torch._dynamo.eval_frame as compiler

    before = torch.backends.mha.get_fastpath_enabled(), compiler._stance.stance
    assert before == (True, "default")
    entered, left = threading.Event(), threading.Event()

    model, x = PlainGPT(), tokens()
    anatomy = survey(model, lambda: model(x))
    thread = threading.Thread(target=lambda: looked(entered, left, anatomy))
    with Recorder(model, [Keep()], anatomy=anatomy):
        thread.start()
        assert entered.wait(30)
    between = torch.backends.mha.get_fastpath_enabled(), compiler._stance.stance
    left.set()
    thread.join()
    assert between == (False, "force_eager")
    assert (torch.backends.mha.get_fastpath_enabled(), compiler._stance.stance) == before


def looked(entered, left, anatomy):
    with Recorder(PlainGPT(), [Keep()], anatomy=anatomy):
        entered.set()
        left.wait(30)
