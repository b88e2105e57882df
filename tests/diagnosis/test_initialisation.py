"""A reference at initialisation is what the class gives by itself, and making it leaves no trace."""

import copy
import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES
from plain import PlainGPT
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from twins import SIZES, Scale, alike, llama, moved, seeded, whole_state

from fullrank.diagnosis import initialisation
from fullrank.diagnosis.free_memory import free_memory
from fullrank.diagnosis.freshness import freshness
from fullrank.diagnosis.initialisation import base_parameters, reinitialised
from untouched import changes

CHOSEN = (
    *("bert", "roberta", "electra", "vit", "gpt2", "llama", "qwen2", "phi3", "gemma", "olmo3", "gpt_neox", "opt"),
    *("t5", "bart", "clip", "mixtral"),
)


def raw(family):
    return seeded(lambda: FAMILIES[family]().model)


@pytest.mark.parametrize("family", CHOSEN)
def test_a_hugging_face_model_is_built_as_its_class_builds_it(family):
    model = moved(raw(family))
    before = whole_state(model)
    found = reinitialised(model, seed=7)
    assert not changes(before, whole_state(model))
    assert found.model is not None, found.how
    assert found.how == f"{type(model).__name__} built anew from its configuration, seed 7."
    assert alike(found.model, seeded(lambda: type(model)(copy.deepcopy(model.config)), 7))
    assert not found.model.training
    assert found.model.config is not model.config
    assert found.model.config._attn_implementation == model.config._attn_implementation


@pytest.mark.parametrize("make", [llama, lambda: seeded(PlainGPT)])
def test_another_seed_is_another_draw_and_the_same_the_same(make):
    one, same, other = (reinitialised(make(), seed=seed).model for seed in (1, 1, 2))
    assert alike(one, same)
    drawn = [torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True) if p.ndim > 1]
    assert drawn
    assert not any(drawn)


def test_nothing_of_the_model_is_shared_with_the_reference():
    for model in (llama(), seeded(PlainGPT)):
        twin = reinitialised(model, seed=1).model
        mine = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
        assert not mine & {tensor.data_ptr() for tensor in twin.state_dict().values() if tensor.numel()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, lambda: seeded(PlainGPT)])
def test_every_tensor_has_the_dtype_that_it_has_in_the_model(make, dtype):
    model = make().to(dtype)
    next(iter(model.children())).float()  # as some checkpoints keep a few modules
    twin = reinitialised(model, seed=1).model
    assert [t.dtype for t in twin.state_dict().values()] == [t.dtype for t in model.state_dict().values()]
    assert [b.dtype for b in twin.buffers()] == [b.dtype for b in model.buffers()]


def test_buffers_that_are_no_state_are_those_of_the_model():
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    twin = reinitialised(model, seed=1).model
    assert torch.equal(twin.rotary_emb.inv_freq, model.rotary_emb.inv_freq)


def test_tied_weights_are_tied():
    model = seeded(lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)))
    twin = reinitialised(model, seed=1).model
    assert twin.lm_head.weight is twin.transformer.wte.weight
    plain = seeded(PlainGPT)
    plain.head.weight = plain.wte.weight
    twin = reinitialised(plain, seed=1).model
    assert twin.head.weight is twin.wte.weight
    assert twin.wte.weight is not plain.wte.weight


def test_kernels_that_were_asked_for_are_those_of_the_reference():
    model = llama()
    model.set_attn_implementation("eager")
    assert reinitialised(model, seed=1).model.config._attn_implementation == "eager"


def test_a_model_that_was_cut_is_reset_as_it_is_now():
    model = moved(llama(num_hidden_layers=4))
    model.layers = model.layers[:2]
    before = whole_state(model)
    found = reinitialised(model, seed=1)
    assert not changes(before, whole_state(model))
    assert found.how.startswith("a copy of LlamaModel reset module by module")
    assert len(found.model.layers) == 2
    assert torch.equal(found.model.norm.weight, torch.ones(16))
    assert found.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_model_made_with_more_than_a_configuration_is_reset():
    model = moved(seeded(lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False)))
    twin = reinitialised(model, seed=1).model
    assert twin.pooler is None
    assert twin.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not twin.embeddings.word_embeddings.weight[0].any()  # the padding row
    assert not twin.encoder.layer[0].output.dense.bias.any()


class Says(torch.Tensor):
    """A tensor of a library's own class."""


def closed_over(model):
    linear, forward = model[0], model[0].forward
    linear.forward = lambda x: forward(x) + 1
    return model


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is going out of use, and still in use
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def wrapped(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks models for what they call otherwise now
        return peft.get_peft_model(model, config)


def prompted():
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)))
    return wrapped(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


REFUSED = {
    "a parameter of its own": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(moved(Scale()))),
        "Scale '1.0' holds a parameter 'scale' of its own",
    ),
    "a root of its own": (lambda: moved(Scale()), "Scale holds a parameter 'scale' of its own"),
    "on the meta device": (lambda: nn.Linear(8, 8, device="meta"), "offloaded, or on the meta device"),
    "offloaded": (
        lambda: cpu_offload(llama(), execution_device=torch.device("cpu")),
        "offloaded, or on the meta device",
    ),
    "8 bits": (lambda: nn.ParameterList([nn.Parameter(torch.ones(4).to(torch.int8), False)]), "quantised (int8)"),
    "own class": (lambda: nn.ParameterList([nn.Parameter(torch.ones(4).as_subclass(Says))]), "quantised (Says)"),
    "packed": (lambda: quantised(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))), "quantised (packed)"),
    "learned tokens": (prompted, "an adapter puts learned tokens before every sequence"),
    "another forward": (
        lambda: closed_over(nn.Sequential(nn.Linear(8, 8))),
        "the forward of Linear '0' was replaced",
    ),
    "no parameters": (nn.ReLU, "ReLU has no parameters"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_where_there_is_no_reference_one_sentence_says_why(what):
    make, reason = REFUSED[what]
    model = make()
    before = whole_state(model)
    found = reinitialised(model, seed=1)
    assert found.model is None
    assert found.how.startswith("no reference at initialisation: ")
    assert reason in found.how
    assert found.how.endswith(".")
    assert "\n" not in found.how
    assert not changes(before, whole_state(model))


@pytest.mark.parametrize(("free", "fits"), [(10 * 288, True), (2 * 288, True), (2 * 288 - 1, False)])
def test_a_copy_takes_no_more_than_half_of_the_free_memory(monkeypatch, free, fits):
    monkeypatch.setattr(initialisation, "free_memory", lambda device: free)
    found = reinitialised(nn.Linear(8, 8), seed=1)  # 72 numbers of 4 bytes
    assert (found.model is not None) == fits
    assert fits or "half of the free memory on cpu" in found.how


def test_where_free_memory_is_not_known_a_copy_of_a_few_gigabytes_is_made(monkeypatch):
    monkeypatch.setattr(initialisation, "free_memory", lambda device: None)
    assert reinitialised(nn.Linear(8, 8), seed=1).model is not None
    large = nn.ParameterList([nn.Parameter(torch.zeros(1).expand(2**31 + 1))])  # without the memory it speaks of
    assert "8 GiB is allowed where free memory is not known" in reinitialised(large, seed=1).how


def test_hooks_of_others_are_not_called_by_the_reference():
    heard = []
    for model in (llama(), seeded(PlainGPT)):
        model.register_forward_hook(lambda *_: heard.append(1))
        before = whole_state(model)
        found = reinitialised(model, seed=1)
        assert "without the 1 hook that others have put on the model" in found.how
        found.model(torch.arange(5)[None])
        assert not heard
        assert not changes(before, whole_state(model))
        model(torch.arange(5)[None])
        assert heard.pop() == 1


def test_a_forward_that_others_have_replaced_is_not_that_of_the_reference():
    model = llama()
    forward = model.layers[0].mlp.forward
    plain = reinitialised(llama(), seed=1).model
    model.layers[0].mlp.forward = lambda x: 2 * forward(x)
    found = reinitialised(model, seed=1)
    assert "without the 1 replaced forward that others have put on the model" in found.how
    ids = torch.arange(5)[None]
    assert torch.equal(found.model(ids).last_hidden_state, plain(ids).last_hidden_state)


def adapted(**options):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return config, seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)))


def test_of_an_adapted_model_the_base_architecture_is_the_reference():
    config, base = adapted()
    plain = reinitialised(base, seed=3).model
    names = list(dict(base.named_parameters()))
    model = wrapped(base, config).eval()
    before = whole_state(model)
    found = reinitialised(model, seed=3)
    assert not changes(before, whole_state(model))
    assert found.how == "LlamaForCausalLM built anew from its configuration, without its adapters, seed 3."
    assert alike(found.model, plain)
    assert set(names) <= set(base_parameters(model))
    assert base_parameters(model)[names[1]] is model.get_parameter(
        "base_model.model." + names[1].replace(".q_proj.", ".q_proj.base_layer.")
    )


def test_adapters_on_a_plain_module_are_refused():
    model = wrapped(seeded(PlainGPT), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    assert "PlainGPT has adapters, and cannot be built" in reinitialised(model, seed=1).how


@pytest.mark.gpu
@pytest.mark.parametrize("make", [llama, lambda: seeded(PlainGPT)])
def test_on_a_gpu_the_reference_is_drawn_there_and_its_random_state_is_as_it_was(make):
    model = moved(make()).cuda()
    before = whole_state(model) | {"cuda": torch.cuda.get_rng_state_all()}
    one, same, other = (reinitialised(model, seed=seed).model for seed in (1, 1, 2))
    assert not changes(before, whole_state(model) | {"cuda": torch.cuda.get_rng_state_all()})
    assert {tensor.device for tensor in one.state_dict().values()} == {next(model.parameters()).device}
    assert alike(one, same)
    assert not alike(one, other)
    assert freshness(one, other)[0] == "fresh"
    assert freshness(model, one)[0] == "trained"
    assert free_memory(torch.device("cuda")) > 2**20


def test_a_copy_goes_to_where_random_state_is_kept_before_it_is_reset_and_back_afterwards(monkeypatch):
    done = []

    class Draws(nn.Linear):
        def to(self, *given, **named):
            raise AssertionError("the whole copy is moved")

        def reset_parameters(self):
            done.append("drawn")
            super().reset_parameters()

    class Whole(nn.Sequential):
        def to(self, place):
            done.append(str(place))
            return nn.Module.to(self, place)

    model = Whole(Draws(8, 8), nn.LayerNorm(8), Draws(8, 8))
    expected = reinitialised(model, seed=1).model
    done.clear()
    reinitialised(model, seed=1)
    assert done == ["drawn", "drawn"]  # nothing is moved where both are one
    done.clear()
    monkeypatch.setattr(initialisation, "_place", lambda device: torch.device("cpu", 0))  # by another name
    found = reinitialised(model, seed=1).model
    assert done == ["cpu:0", "drawn", "drawn", "cpu"]
    assert alike(found, expected)


@pytest.mark.gpu
def test_a_copy_is_reset_on_the_cpu_where_the_random_state_of_its_device_is_not_kept(monkeypatch):
    """As on MPS and XPU; here CUDA stands for them."""
    monkeypatch.setattr(initialisation, "_place", lambda device: torch.device("cpu"))
    drawn = []

    class Draws(nn.Linear):
        def reset_parameters(self):
            drawn.append(self.weight.device.type)
            super().reset_parameters()

    model = nn.Sequential(Draws(8, 8), nn.LayerNorm(8), Draws(8, 8)).cuda()
    drawn.clear()
    before = whole_state(model) | {"cuda": torch.cuda.get_rng_state_all()}
    found = reinitialised(model, seed=1)
    assert not changes(before, whole_state(model) | {"cuda": torch.cuda.get_rng_state_all()})
    assert drawn == ["cpu", "cpu"]
    assert {tensor.device for tensor in found.model.state_dict().values()} == {next(model.parameters()).device}
    assert alike(found.model.cpu(), reinitialised(model.cpu(), seed=1).model)
