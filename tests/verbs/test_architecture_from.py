"""An architecture read off a model says what the model is, in numbers that plain code gives of its named weights."""

import copy
import dataclasses
import functools
import math
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn

import fullrank
from fullrank.errors import ArchitectureError, FullrankError
from fullrank.spec.quiet import forked_rng
from fullrank.spec.shallow import shallow
from fullrank.verbs.architecture_from import architecture_from_config, architecture_from_model
from untouched import changes, everything

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZE | {"vocab_size": 60}
GROUPED = TEXT | {"num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class PlainBlock(nn.Module):
    """Pre-norm with scales per channel, a skip of 0.8 past attention, tanh, separate biases; functions throughout."""

    def __init__(self, width=24, heads=3, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        names = {"wq": (width, width), "wk": (width, width), "wv": (width, width), "wo": (width, width)}
        for name, shape in (names | {"w1": (width, 40), "w2": (40, width)}).items():
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(shape, generator=draw)))
        for name, size in {"bo": width, "bv": width, "b1": 40, "b2": width}.items():
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(size, generator=draw)))
        self.scale_a = nn.Parameter(0.05 * torch.randn(width, generator=draw))
        self.scale_m = nn.Parameter(torch.full((width,), 0.2))
        self.heads = heads

    def forward(self, x):
        batch, tokens, width = x.shape
        h = nn.functional.layer_norm(x, (width,))
        q, k, v = (
            y.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for y in (h @ self.wq, h @ self.wk, h @ self.wv + self.bv)
        )
        logits = q @ k.transpose(-2, -1) * 0.4
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        a = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        a = a.transpose(1, 2).reshape(batch, tokens, width) @ self.wo + self.bo
        x = 0.8 * x + self.scale_a * a
        h = nn.functional.layer_norm(x, (width,))
        return x + self.scale_m * (torch.tanh(h @ self.w1 + self.b1) @ self.w2 + self.b2)


class Plain(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.table = nn.Parameter(torch.randn(60, 24, generator=torch.Generator().manual_seed(9)))
        self.layers = nn.ModuleList(PlainBlock(seed=seed) for seed in range(blocks))

    def forward(self, input_ids):
        x = self.table[input_ids]
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(sequences=4, length=20, seed=0):
    return torch.randint(3, 60, (sequences, length), generator=torch.Generator().manual_seed(seed))


def text(model):
    return model.eval(), {"input_ids": tokens()}


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.2, activation="relu", norm_first=norm_first, batch_first=True
    )
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model.eval(), torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))


MODELS = {
    "gpt2": lambda: text(hf.GPT2Model(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=60))),
    "llama": lambda: text(hf.LlamaModel(hf.LlamaConfig(**GROUPED))),
    "bert": lambda: text(hf.BertModel(hf.BertConfig(**TEXT))),
    "vit": lambda: (
        hf.ViTModel(hf.ViTConfig(**SIZE, image_size=16, patch_size=4)).eval(),
        {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
    "gemma2": lambda: text(
        hf.Gemma2Model(hf.Gemma2Config(**GROUPED, head_dim=16, query_pre_attn_scalar=64, sliding_window=8))
    ),
    "gpt_neox": lambda: text(hf.GPTNeoXModel(hf.GPTNeoXConfig(**TEXT))),
    "olmo2": lambda: text(hf.Olmo2Model(hf.Olmo2Config(**GROUPED, **ENDS))),
    "mistral": lambda: text(hf.MistralModel(hf.MistralConfig(**GROUPED, sliding_window=8))),
    "granite": lambda: text(
        hf.GraniteModel(hf.GraniteConfig(**GROUPED, attention_multiplier=0.2, residual_multiplier=0.5))
    ),
    "bloom": lambda: text(hf.BloomModel(hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=60))),
    "t5": lambda: (
        hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=60)).eval(),
        {"input_ids": tokens()},
    ),
    "torch_pre": lambda: encoder(True),
    "torch_post": lambda: encoder(False),
    "plain": lambda: (Plain().eval(), tokens()),
}

USUAL = {"depth": 3, "width": 32, "heads": 4, "head_width": 8, "mlp_width": 48, "parallel": False, "qk_norm": False}
USUAL |= {"attention_branch": 1.0, "mlp_branch": 1.0, "attention_skip": 1.0, "mlp_skip": 1.0, "softcap": None}
USUAL |= {"window": None, "gated": False, "dropout": 0.0, "context": 20}
LLAMA = {"norm": "rmsnorm", "activation": "silu", "gated": True, "mask": "causal", "positions": "rotary"}
LLAMA |= {"key_value_heads": 2, "stack": "decoder"}
FORMS = {
    "gpt2": {"mlp_width": 128, "dropout": 0.1, "mask": "causal", "positions": "learned", "activation": "gelu"}
    | {"norm": "layernorm", "placement": "pre"},
    "llama": LLAMA | {"placement": "pre"},
    "bert": {"norm": "layernorm", "placement": "post", "mask": "full", "positions": "learned", "dropout": 0.1},
    "vit": {"norm": "layernorm", "placement": "pre", "mask": "full", "positions": "learned", "context": 17},
    "gemma2": LLAMA
    | {"activation": "gelu", "placement": "peri", "head_width": 16, "softcap": 50.0, "logit_scale": 0.125},
    "gpt_neox": {"parallel": True, "placement": "pre", "norm": "layernorm", "mask": "causal", "positions": "rotary"},
    "olmo2": LLAMA | {"placement": "res-post", "qk_norm": True},
    "mistral": LLAMA | {"placement": "pre", "window": 8},
    "granite": LLAMA | {"placement": "pre", "attention_branch": 0.5, "mlp_branch": 0.5, "logit_scale": 0.2},
    "bloom": {"mlp_width": 128, "placement": "pre", "positions": "alibi", "mask": "causal"},
    "t5": {"norm": "rmsnorm", "activation": "relu", "placement": "pre", "positions": "relative", "logit_scale": 1.0}
    | {"dropout": 0.1},
    "torch_pre": {"activation": "relu", "placement": "pre", "positions": "none", "dropout": 0.2, "context": 10},
    "torch_post": {"activation": "relu", "placement": "post", "positions": "none", "dropout": 0.2, "context": 10},
    "plain": {"width": 24, "heads": 3, "mlp_width": 40, "activation": "tanh", "placement": "pre", "mask": "causal"}
    | {"attention_skip": 0.8, "mlp_branch": 0.2, "logit_scale": 0.4, "positions": "none"},
}
EVERY = pytest.mark.parametrize("name", MODELS)


@functools.cache
def model_of(name):
    with forked_rng(0):
        return MODELS[name]()


@functools.cache
def read(name):
    return architecture_from_model(*model_of(name))


@EVERY
def test_the_form_of_a_model_is_told_without_a_name(name):
    found = dataclasses.asdict(read(name))
    wanted = USUAL | FORMS[name]
    if name == "plain":
        wanted |= {"attention_branch": found["attention_branch"]}  # see the test of its scales
    if "logit_scale" not in wanted:
        wanted |= {"logit_scale": wanted["head_width"] ** -0.5}
    for field, value in wanted.items():
        assert found[field] == (pytest.approx(value, rel=2e-3) if isinstance(value, float) else value), field


@EVERY
def test_reading_leaves_a_model_and_the_process_as_they_were(name):
    model, batch = model_of(name)
    before = everything(model)
    architecture_from_model(model, batch)
    assert changes(before, everything(model)) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gemma2", "granite", "bloom", "olmo2"])
def test_half_precision_is_read_as_what_it_is_but_for_rounding(name):
    model, batch = model_of(name)
    found = architecture_from_model(copy.deepcopy(model).bfloat16(), batch)
    assert differences(found, read(name)) == set()
    assert found.logit_scale == pytest.approx(read(name).logit_scale, rel=5e-3)
    assert found.attention_branch == pytest.approx(read(name).attention_branch, rel=5e-3)


# ---------------------------------------------------------------- numbers, of named weights


def rms(tensors):
    squares = [tensor.detach().double().square() for tensor in tensors]
    return math.sqrt(sum(float(one.sum()) for one in squares) / sum(one.numel() for one in squares))


def named(model, pattern):
    return [model.get_parameter(pattern.format(layer)) for layer in range(3)]


NAMES = {
    "llama": {
        **{role: f"layers.{{}}.self_attn.{role}_proj.weight" for role in "qkvo"},
        **{role: f"layers.{{}}.mlp.{role}_proj.weight" for role in ("up", "gate", "down")},
    },
    "bert": {
        "q": "encoder.layer.{}.attention.self.query.weight",
        "k": "encoder.layer.{}.attention.self.key.weight",
        "v": "encoder.layer.{}.attention.self.value.weight",
        "o": "encoder.layer.{}.attention.output.dense.weight",
        "up": "encoder.layer.{}.intermediate.dense.weight",
        "down": "encoder.layer.{}.output.dense.weight",
    },
    "plain": {
        **{role: f"layers.{{}}.w{role}" for role in "qkvo"},
        "up": "layers.{}.w1",
        "down": "layers.{}.w2",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_standard_deviations_are_those_of_the_named_weights(name):
    model, _ = model_of(name)
    for role, pattern in NAMES[name].items():
        assert getattr(read(name), f"std_{role}") == pytest.approx(rms(named(model, pattern)), rel=1e-5), role


def test_of_a_fused_weight_every_role_has_its_own_rows():
    model, _ = model_of("gpt2")
    fused = [layer.attn.c_attn.weight for layer in model.h]
    for place, role in enumerate("qkv"):
        wanted = rms([weight[:, 32 * place : 32 * place + 32] for weight in fused])
        assert getattr(read("gpt2"), f"std_{role}") == pytest.approx(wanted, rel=1e-5)


def test_gpt2s_last_weights_are_as_much_smaller_as_it_is_deep():
    config = hf.GPT2Config(n_embd=64, n_layer=8, n_head=4, n_positions=64, vocab_size=60)
    one = fullrank.Architecture.from_config(config, context=16)
    assert one.std_q == pytest.approx(0.02, rel=0.02)
    for std in (one.std_o, one.std_down):
        assert std == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_scales_per_channel_are_branch_multipliers_by_their_root_mean_square():
    model, _ = model_of("plain")
    found = abs(read("plain").attention_branch)
    assert found == pytest.approx(rms(layer.scale_a for layer in model.layers), rel=1e-4)


def test_biases_are_those_that_branches_add():
    model, _ = model_of("plain")
    with torch.no_grad():
        attention = [layer.bv @ layer.wo + layer.bo for layer in model.layers]
    one = read("plain")
    assert one.std_bias_attention == pytest.approx(rms(attention), rel=1e-4)
    assert one.std_bias_mlp == pytest.approx(rms(layer.b2 for layer in model.layers), rel=1e-4)
    assert one.std_bias_up == pytest.approx(rms(layer.b1 for layer in model.layers), rel=1e-4)


def test_biases_of_fused_weights_are_found():
    model, batch = copy.deepcopy(model_of("gpt2"))
    with torch.no_grad():
        for place, layer in enumerate(model.h):
            layer.attn.c_attn.bias.copy_(torch.randn(96, generator=torch.Generator().manual_seed(place)))
            layer.attn.c_proj.bias.fill_(0.5)
        added = [layer.attn.c_attn.bias[64:] @ layer.attn.c_proj.weight + 0.5 for layer in model.h]
    assert architecture_from_model(model, batch).std_bias_attention == pytest.approx(rms(added), rel=1e-4)


def cosines(states, late):
    """Mean cosine between different tokens of each sequence, the plain way."""
    found = []
    for X in states.double():
        X = X[len(X) // 2 :] if late else X
        U = X / X.norm(dim=-1, keepdim=True)
        found.append(float((U @ U.T)[~torch.eye(len(X), dtype=torch.bool)].mean()))
    return torch.tensor(found, dtype=torch.float64)


FIRST = {"gpt2": "h.0", "llama": "layers.0", "bert": "encoder.layer.0", "vit": "layers.0", "plain": "layers.0"}
FIRST |= {"gemma2": "layers.0", "t5": "encoder.block.0", "torch_post": "layers.0"}


@pytest.mark.parametrize("name", FIRST)
def test_correlation_and_size_are_those_of_what_the_first_block_is_given(name):
    model, batch = model_of(name)
    kept = []
    first = next(module for path, module in model.named_modules() if path.endswith(FIRST[name]))
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    one = read(name)
    rho = cosines(kept[0], late=one.mask == "causal")
    assert one.correlation == pytest.approx(float(rho.mean()), abs=1e-6)
    assert one.correlation_stderr == pytest.approx(float(rho.std()) / 2, rel=1e-4)
    assert one.input_rms == pytest.approx(rms(kept), rel=1e-5)


def test_padding_is_no_token():
    model, batch = model_of("bert")
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[:2, 12:] = 0
    padded = architecture_from_model(model, batch | {"attention_mask": mask})
    kept = []
    handle = model.encoder.layer[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(**batch, attention_mask=mask)
    handle.remove()
    rho = torch.cat([cosines(kept[0][:2, :12], late=False), cosines(kept[0][2:], late=False)])
    assert padded.correlation == pytest.approx(float(rho.mean()), abs=1e-6)


# ---------------------------------------------------------------- what is refused


class Squared(PlainBlock):
    """A nonlinearity without a name here."""

    def forward(self, x):
        h = nn.functional.layer_norm(x, x.shape[-1:])
        q, k, v = ((h @ w).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + a @ self.wo
        return x + torch.relu(nn.functional.layer_norm(x, x.shape[-1:]) @ self.w1).square() @ self.w2


def squared():
    model = Plain()
    model.layers = nn.ModuleList(Squared(seed=seed) for seed in range(3))
    return model.eval(), tokens()


def resnet():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(4, 8)


def mixtral():
    config = hf.MixtralConfig(**GROUPED, num_local_experts=2, **ENDS)
    return text(hf.MixtralModel(config))


@pytest.mark.parametrize(
    ("make", "words"),
    [(squared, "no identity, relu, gelu, silu or tanh"), (resnet, "no stack of attention"), (mixtral, "experts")],
)
def test_what_an_architecture_has_no_words_for_is_refused_in_one_sentence(make, words):
    with pytest.raises(ArchitectureError, match=words) as refusal:
        architecture_from_model(*make())
    assert "\n" not in str(refusal.value)


def test_an_unknown_stack_is_answered_with_those_there_are():
    with pytest.raises(ArchitectureError, match="called 'decoder'; its stacks are: encoder"):
        architecture_from_model(*model_of("bert"), stack="decoder")


def test_what_is_no_model_or_no_configuration_is_refused():
    with pytest.raises(FullrankError, match="neither a module nor a SPEC"):
        architecture_from_model(3)
    with pytest.raises(FullrankError, match="no transformers configuration"):
        architecture_from_config({"hidden_size": 3})


# ---------------------------------------------------------------- from a configuration


def differences(one, other, *but):
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    near = {
        name for name in a if isinstance(a[name], float) and math.isclose(a[name], b[name], rel_tol=0.1, abs_tol=0.05)
    }
    return {name for name in a if a[name] != b[name]} - near - set(but)


CONFIGURATIONS = {
    "llama": lambda: hf.LlamaConfig(**(GROUPED | {"num_hidden_layers": 5})),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=5, n_head=4, n_positions=64, vocab_size=60),
    "gemma3": lambda: hf.Gemma3TextConfig(**(GROUPED | {"num_hidden_layers": 8}), sliding_window=4, head_dim=8),
    "vit": lambda: hf.ViTConfig(**(SIZE | {"num_hidden_layers": 5}), image_size=16, patch_size=4),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_first_blocks_alone_give_what_the_whole_model_gives(name):
    context = None if name == "vit" else 16
    whole = architecture_from_config(CONFIGURATIONS[name](), context=context)
    part = architecture_from_config(CONFIGURATIONS[name](), context=context, whole=0)
    assert differences(part, whole) == set()
    assert part.depth > 4


def test_blocks_are_cut_only_where_every_kind_has_occurred():
    cut = shallow(CONFIGURATIONS["gemma3"](), seed=0, whole=0)
    assert len(cut.model.layers) == 6  # five windows, then all tokens
    assert cut.depths == {"layers": 8}


def test_a_configuration_is_left_as_it_was_and_so_is_the_random_state():
    config = CONFIGURATIONS["gpt2"]()
    before, state = config.to_dict(), torch.get_rng_state()
    first = architecture_from_config(config, context=16, whole=0)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert architecture_from_config(config, context=16, whole=0) == first
    assert architecture_from_config(config, context=16, whole=0, seed=1) != first


def test_a_spec_is_as_good_as_a_configuration():
    options = "n_embd=32&n_layer=2&n_head=4&n_positions=64&vocab_size=60"
    one = fullrank.Architecture.from_config(f"arch:gpt2?{options}", context=16)
    other = fullrank.Architecture.from_model(f"arch:gpt2?{options}", context=16)
    assert (one.depth, one.width, one.context) == (2, 32, 16)
    assert differences(one, other) == set()


def test_the_class_loads_no_transformers():
    code = (
        "import fullrank, sys; a = fullrank.Architecture(depth=2, width=8); str(a); a.with_(residual_scale=.5); "
        "print([name for name in ('transformers', 'scipy', 'pandas') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_seven_billion_parameters_take_no_more_than_three_gibibytes():
    code = (
        "import resource, transformers as hf, fullrank; one = fullrank.Architecture.from_config(hf.LlamaConfig()); "
        "print(one.depth, one.width, one.mlp_width, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *sizes, peak = map(int, run.stdout.split())
    assert sizes == [32, 4096, 11008]
    assert peak < 3 * 2**20  # KiB
