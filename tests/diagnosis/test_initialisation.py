"""A reference at initialisation is what the class gives by itself, and making it leaves no trace."""

import copy
import random
import warnings

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES
from plain import PlainGPT
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from fullrank.diagnosis import free_memory as free_memory_module
from fullrank.diagnosis import initialisation
from fullrank.diagnosis.free_memory import free_memory
from fullrank.diagnosis.freshness import freshness
from fullrank.diagnosis.initialisation import base_parameters, reinitialised
from untouched import changes, everything

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
CHOSEN = (
    *("bert", "roberta", "electra", "vit", "gpt2", "llama", "qwen2", "phi3", "gemma", "olmo3", "gpt_neox", "opt"),
    *("t5", "bart", "clip", "mixtral"),
)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def raw(family):
    return seeded(lambda: FAMILIES[family]().model)


def llama(**options):
    return seeded(lambda: LlamaModel(LlamaConfig(**SIZES | options)))


def moved(model):
    """The same model with every parameter somewhere else, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def alike(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def whole_state(model):
    return everything(model) | {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist()}


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


MAKERS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32),
    "pair": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "recurrent": lambda: nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.LSTM(8, 8, 2)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.Conv2d(8, 3, 3)),
    "plain code": PlainGPT,
}


@pytest.mark.parametrize("name", MAKERS)
def test_any_other_model_is_reset_to_what_its_class_gives_by_itself(name):
    model = moved(seeded(MAKERS[name]))
    for buffer in model.buffers():
        buffer += 3
    model.train()
    before = whole_state(model)
    found = reinitialised(model, seed=7)
    assert not changes(before, whole_state(model))
    assert found.model is not None, found.how
    assert alike(found.model, seeded(MAKERS[name], 7))
    assert not any(module.training for module in found.model.modules())
    assert "reset module by module" in found.how
    assert found.how.endswith("seed 7.")


def test_layers_that_torch_copies_from_each_other_are_drawn_one_by_one():
    layer = seeded(lambda: nn.TransformerEncoderLayer(16, 2, 32))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    twin = reinitialised(model, seed=1).model
    assert torch.equal(model.layers[0].linear1.weight, model.layers[1].linear1.weight)
    assert not torch.equal(twin.layers[0].linear1.weight, twin.layers[1].linear1.weight)
    assert twin.layers[1].linear1.weight.std().item() == pytest.approx(layer.linear1.weight.std().item(), rel=0.1)


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


class Initialises(nn.Module):
    """Weights as its author wants them, on top of what torch draws."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.constant_(module.bias, 0.25)

    def forward(self, x):
        return self.body(x)


class Scale(nn.Module):
    """A norm with a parameter of its own and no way to say how it starts."""

    def __init__(self, width=8):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


class Resettable(Scale):
    def reset_parameters(self):
        nn.init.constant_(self.scale, 1.0)


def test_what_an_author_does_with_modules_is_done_after_they_are_reset():
    twin = reinitialised(moved(seeded(Initialises)), seed=7).model
    assert alike(twin, seeded(Initialises, 7))
    assert twin.body[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(twin.body[2].bias, torch.full((64,), 0.25))


def test_a_module_with_a_way_of_its_own_is_reset():
    twin = reinitialised(moved(nn.Sequential(nn.Linear(8, 8), Resettable())), seed=1).model
    assert torch.equal(twin[1].scale, torch.ones(8))


def test_a_parameter_that_is_still_constant_is_where_it_started():
    found = reinitialised(nn.Sequential(nn.Linear(8, 8), Scale(), Scale()), seed=1)
    assert torch.equal(found.model[2].scale, torch.ones(8))
    assert "2 constant parameters kept" in found.how


def test_a_hugging_face_model_inside_another_module_is_initialised_by_its_own_method():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = llama(initializer_range=0.5), nn.Linear(16, 3)

    twin = reinitialised(moved(Reader()), seed=1).model
    assert twin.trunk.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(twin.trunk.norm.weight, torch.ones(16))


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


def test_a_copy_that_fails_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].kept = model[0].weight * 2  # a tensor with a history, as a cache that was never let go
    found = reinitialised(model, seed=1)
    assert found.model is None
    assert "Sequential cannot be copied (" in found.how


def test_a_way_that_fails_is_refused():
    class Fails(nn.Linear):
        def reset_parameters(self):
            if hasattr(self, "made"):
                raise ValueError("only once.")

    model = nn.Sequential(Fails(8, 8))
    model[0].made = True
    found = reinitialised(model, seed=1)
    assert found.how == "no reference at initialisation: reset_parameters of Fails '0' failed (only once)."


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


KERNEL = {"/proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 500 kB\n"}
GROUP = {
    "/proc/self/cgroup": "0::/outer/inner\n",
    "/sys/fs/cgroup/outer/inner/memory.max": "max\n",
    "/sys/fs/cgroup/outer/memory.max": "300000\n",
    "/sys/fs/cgroup/outer/memory.current": "250000\n",
    "/sys/fs/cgroup/outer/memory.stat": "anon 200000\ninactive_file 40000\n",
}
FIRST = {
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "8000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [(KERNEL, 512_000), (KERNEL | GROUP, 90_000), (KERNEL | FIRST, 1000), (KERNEL | GROUP | FIRST, 1000)],
)
def test_free_memory_is_the_least_that_the_kernel_and_every_limit_leave(monkeypatch, files, free):
    monkeypatch.setattr(free_memory_module, "_text", lambda file: files.get(str(file), ""))
    assert free_memory(torch.device("cpu")) == free


def test_free_memory_of_this_machine_is_a_number_and_of_others_unknown():
    assert free_memory(torch.device("cpu")) > 2**20
    assert free_memory(torch.device("mps")) is None


def test_hooks_of_others_are_not_called_by_the_reference():
    heard = []
    for model in (llama(), seeded(PlainGPT)):
        model.register_forward_hook(lambda *_: heard.append(1))
        before = whole_state(model)
        found = reinitialised(model, seed=1)
        assert "without the 1 hook registered on the model" in found.how
        found.model(torch.arange(5)[None])
        assert not heard
        assert not changes(before, whole_state(model))
        model(torch.arange(5)[None])
        assert heard.pop() == 1


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
