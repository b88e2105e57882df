"""Compiled models: the rows of the eager one, under its names, and the compiled graphs are still there."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaModel

import fullrank
from alike import differences
from fullrank.errors import NonFiniteError
from untouched import changes, everything

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def wrapped(backend):
    return torch.compile(llama(), backend=backend)


def in_place(backend):
    model = llama()
    model.compile(backend=backend)
    return model


def blocks_in_place(backend):
    model = llama()
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def blocks_wrapped(backend):
    model = llama()
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer, backend=backend)
    return model


def attention_wrapped(backend):
    model = llama()
    for layer in model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend=backend)
    return model


WAYS = [wrapped, in_place, blocks_in_place, blocks_wrapped, attention_wrapped]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager():
    return examine(llama(), IDS)


def run(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).last_hidden_state


def state(model):
    return everything(model) | {"compiled": [getattr(m, "_compiled_call_impl", None) for m in model.modules()]}


def the_same(model, eager):
    """Examine a compiled model that has run already."""
    before = run(model)
    graphs = dict(counters["stats"])
    assert graphs["unique_graphs"] > 0
    kept = state(model)
    report = examine(model, IDS)
    assert not differences(report, eager)
    assert dict(counters["stats"]) == graphs  # examining compiled nothing
    assert torch.equal(run(model), before)
    assert dict(counters["stats"]) == graphs  # and the graphs of before were run again
    assert not changes(kept, state(model))
    return report


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_the_eager_model_and_nothing_is_compiled_again(way, eager):
    report = the_same(way("aot_eager" if way is blocks_in_place else "eager"), eager)
    assert report.about["architecture"] == "LlamaModel"
    assert report.about["stacks"] == eager.about["stacks"]  # with the names of the blocks
    assert report.about["parameters"] == eager.about["parameters"]
    assert sum("without compilation" in note for note in report.about["notes"]) == 1
    assert (report.about["kernels"], eager.about["kernels"]) == ("reference path", "untouched")


def test_a_model_that_has_not_run_yet_is_not_compiled_by_looking(eager):
    model = wrapped("eager")
    assert not differences(examine(model, IDS), eager)
    assert "unique_graphs" not in counters["stats"]
    run(model)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_a_training_step_after_examining_is_the_same_and_not_compiled_again():
    gradients = []
    for look in (False, True):
        torch._dynamo.reset()
        model = wrapped("aot_eager").train()
        model(IDS).last_hidden_state.square().sum().backward()
        if look:
            graphs = dict(counters["stats"])
            examine(model, IDS, spectrum=False)
        model(IDS).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert dict(counters["stats"]) == graphs
    assert all(map(torch.equal, *gradients))


@pytest.mark.slow
@pytest.mark.parametrize("way", [wrapped, blocks_in_place])
def test_the_default_backend(way, eager):
    """It writes C++ and has it compiled, here by g++."""
    the_same(way("inductor"), eager)


@pytest.mark.parametrize("way", [wrapped, in_place])
def test_what_is_not_finite_is_found_inside_of_compiled_modules(way):
    model = way("eager")
    run(model)

    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    model.layers[1].mlp = Broken()
    with pytest.raises(NonFiniteError, match=r"'layers\.1\.mlp'"):
        examine(model, IDS)


def test_weights_are_named_without_the_compiler_s_prefix():
    model = blocks_wrapped("eager")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'layers\.1\.mlp\.up_proj\.weight'"):
        examine(model, IDS)


def test_data_parallel_is_looked_through(eager):
    report = examine(nn.DataParallel(llama()), IDS)
    assert not differences(report, eager)
    assert report.about["architecture"] == "LlamaModel"
    assert report.about["stacks"] == eager.about["stacks"]
