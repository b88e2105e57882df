"""Adapters are measured as they are: neither merged nor switched off, and tokens that they add are counted."""

import functools
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import fullrank
from alike import differences
from fullrank.capture import undisturbed
from fullrank.capture.events import StreamState
from fullrank.capture.recorder import Recorder
from untouched import changes, everything

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


IDS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(12) < torch.tensor([[12], [12], [8]])).long()
VIRTUAL = 3


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    return BertModel(BertConfig(**sizes, num_attention_heads=2)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    return ViTModel(ViTConfig(**sizes, num_attention_heads=2)).eval()


def lora(names, **options):
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=names, init_lora_weights=False, **options)


PIXELS = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
WEIGHTS = {
    "lora llama": (llama, lora(["q_proj", "v_proj", "down_proj"]), TOKENS),
    "lora bert": (bert, lora(["query", "value"]), TOKENS),
    "lora vit": (vit, lora(["q_proj", "v_proj"]), PIXELS),
    "dora llama": (llama, lora(["q_proj"], use_dora=True), TOKENS),
    "ia3 llama": (
        llama,
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        TOKENS,
    ),
}


def adapted(build, config):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package asks transformers in ways that are going out of use
        return peft.get_peft_model(build(), config).eval()


class Keep:
    needs = frozenset({"stream"})

    def __init__(self):
        self.states = {}

    def see(self, event):
        if isinstance(event, StreamState) and event.part == "out":
            self.states[event.layer] = (event.value.clone(), event.real)


def recorded(model, batch, real=None):
    keep = Keep()
    with undisturbed(model), Recorder(model, [keep], real=real):
        model(**batch)
    return keep.states


def hooked(model, blocks, batch):
    """The states as plain hooks see them."""
    states = []

    def first(module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"]).clone())

    def later(module, args, output):
        states.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(later) for block in blocks]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return states


def blocks_of(model):
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    return next(one for one in lists if any(True for _ in one[0].children()))


def state(model):
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    adapters = [(list(m.active_adapters), m.merged, m.disable_adapters, list(m.merged_adapters)) for m in layers]
    return everything(model) | {"adapters": adapters}


@pytest.mark.parametrize("name", WEIGHTS)
def test_states_are_those_of_plain_hooks_with_the_adapter_active(name):
    build, config, batch = WEIGHTS[name]
    model = adapted(build, config)
    expected = hooked(model, blocks_of(model), batch)
    found = recorded(model, batch)
    assert list(found) == [0, 1, 2]
    for layer, state_ in enumerate(expected):
        assert torch.equal(found[layer][0], state_)
    with model.disable_adapter():  # so that the adapter is no identity here
        assert not torch.equal(hooked(model, blocks_of(model), batch)[-1], expected[-1])


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_are_those_of_the_merged_model_and_nothing_was_merged(name):
    build, config, batch = WEIGHTS[name]
    model = adapted(build, config).double().train()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    model(**batch)[0].square().sum().backward()  # in the middle of its training
    before = state(model)
    report = examine(model, batch)
    assert not changes(before, state(model))
    assert report.about["architecture"] == type(build()).__name__
    assert any(note.startswith("adapter default: measured as found, added") for note in report.about["notes"])
    merged = model.merge_and_unload()
    assert not differences(report, examine(merged, batch), tolerance=1e-6)
    assert differences(report, examine(build().double(), batch), tolerance=1e-6)  # of the base alone


def test_gradients_reach_the_frozen_base_and_leave_it_frozen():
    build, config, batch = WEIGHTS["lora llama"]
    batch = batch | {"labels": IDS}
    model = adapted(build, config).double()
    before = state(model)
    assert not model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad
    report = examine(model, batch, spectrum=False, gradients=True, weights=True)
    assert not changes(before, state(model))
    merged = examine(model.merge_and_unload(), batch, spectrum=False, gradients=True)
    mine, theirs = (
        {row.key: row.value for row in one.rows.where(metric="gradient_rms").rows} for one in (report, merged)
    )
    assert mine.keys() == theirs.keys()
    assert all(value == pytest.approx(theirs[key], rel=1e-6) for key, value in mine.items())
    (up,) = report.rows.where(metric="elasticity", layer=1, part="up").rows  # a frozen weight
    (same_up,) = merged.rows.where(metric="elasticity", layer=1, part="up").rows
    assert up.value == pytest.approx(same_up.value, rel=1e-6)


def test_a_switched_off_adapter_stays_off():
    model = adapted(llama, WEIGHTS["lora llama"][1])
    with model.disable_adapter():
        report = examine(model, TOKENS)
    assert any("switched off;" in note for note in report.about["notes"])
    assert not differences(report, examine(llama(), TOKENS), tolerance=1e-6)


LEARNED = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
}


@pytest.mark.parametrize("name", LEARNED)
def test_virtual_tokens_are_real_and_padding_is_still_not(name):
    model = adapted(llama, LEARNED[name])
    found = recorded(model, TOKENS, MASK.bool())
    for layer, expected in enumerate(hooked(model, blocks_of(model), TOKENS)):
        value, real = found[layer]
        assert torch.equal(value, expected)
        assert value.shape[1] == 12 + VIRTUAL
        assert torch.equal(real.sum(1), MASK.sum(1) + VIRTUAL)
        assert bool(real[:, :VIRTUAL].all())
    report = examine(model, TOKENS)
    assert any("3 virtual tokens" in note for note in report.about["notes"])
    assert report.about["input"]["tokens"] == int(MASK.sum())
    # what stands at padded tokens is in no number
    other = TOKENS | {"input_ids": torch.where(MASK.bool(), IDS, 7)}
    assert not differences(report, examine(model, other), tolerance=1e-6)
    (row,) = report.rows.where(metric="rms", layer=2, site="stream", part="out", scope="all").rows
    last, real = found[2]
    expected = [float(x[keep].double().square().mean().sqrt()) for x, keep in zip(last, real, strict=True)]
    assert abs(row.value - sum(expected) / 3) < 1e-6


def test_virtual_keys_are_seen_by_every_query():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model = adapted(llama, config)
    maps = []

    class Maps:
        needs = frozenset({"attention"})

        def see(self, event):
            maps.append(event.attention.dense())

    with undisturbed(model), Recorder(model, [Maps()], real=MASK.bool()):
        model(**TOKENS)
    model.base_model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**TOKENS, output_attentions=True).attentions
    assert len(maps) == len(eager) == 2
    for mine, theirs in zip(maps, eager, strict=True):
        assert mine.shape[-1] == 12 + VIRTUAL
        for sequence, count in enumerate(MASK.sum(1).tolist()):
            assert torch.allclose(mine[sequence, :, :count], theirs[sequence, :, :count], atol=1e-6)
    model.base_model.set_attn_implementation("sdpa")
    report = examine(model, TOKENS)
    assert any("3 virtual keys" in note for note in report.about["notes"])
