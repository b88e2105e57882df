"""Trained weights are told from fresh ones by what they were initialised with."""

import copy
import warnings

import peft
import pytest
import torch
from families import FAMILIES, REFUSED
from plain import PlainGPT
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

from fullrank.diagnosis.freshness import freshness
from fullrank.diagnosis.initialisation import reinitialised
from fullrank.spec import load
from fullrank.spec.loading import demo

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
FRESH = (
    *(
        "bert",
        "roberta",
        "electra",
        "mobilebert",
        "deberta_v2",
        "fnet",
        "vit",
        "swin",
        "gpt2",
        "llama",
        "qwen2",
        "phi3",
    ),
    *("gemma", "olmo", "olmo3", "gpt_neox", "opt", "bloom", "t5", "bart", "clip", "mixtral", "mamba2", "plain_code"),
    *("torch_encoder", "torch_pair"),
)
TRAINED = ("bert", "roberta", "vit", "gpt2", "llama", "gemma", "olmo3", "gpt_neox", "opt", "bart", "plain_code")


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def raw(family):
    case = seeded(FAMILIES[family])
    case.model.eval()
    return case


def llama(**options):
    return seeded(lambda: LlamaModel(LlamaConfig(**SIZES | options)).eval())


def judged(model, **options):
    return freshness(model, reinitialised(model, seed=1).model, **options)


def first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def train(case, optimiser, steps=20):
    target = None
    for _ in range(steps):
        states = first_tensor(case.model(**case.batch))
        target = torch.randn(states.shape, generator=torch.Generator().manual_seed(9)) if target is None else target
        optimiser.zero_grad()
        (states - target).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("family", [name for name in FRESH if name in FAMILIES])
def test_a_default_initialisation_is_fresh(family):
    weights, because = judged(raw(family).model)
    assert weights == "fresh", because
    assert "has the constant or the spread it is initialised with" in because


def test_the_families_that_were_chosen_are_there():
    assert len([name for name in FRESH if name in FAMILIES]) >= 20
    assert set(TRAINED) <= set(FAMILIES)


DRAWN_OTHERWISE = {  # by the cases themselves, so that small models do something
    "mobilevit": "fresh",
    "cvt": "fresh",
    "blip": "fresh",
    "blip2": "unknown",  # its learned queries, which start at 0
}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_the_default_initialisation_of_every_family_is_fresh(family):
    weights, because = judged(raw(family).model)
    assert weights == DRAWN_OTHERWISE.get(family, "fresh"), because
    assert because.startswith("every one of ") == (family not in DRAWN_OTHERWISE), because


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("way", ["adam", "sgd"])
def test_twenty_steps_are_training(family, way):
    case = raw(family)
    parameters = list(case.model.parameters())
    train(case, torch.optim.AdamW(parameters, 1e-3) if way == "adam" else torch.optim.SGD(parameters, 0.1))
    weights, because = judged(case.model)
    assert weights == "trained", because
    assert "have moved" in because


def test_the_pretrained_encoder_is_trained_and_its_own_initialisation_fresh():
    model = load(demo()).model
    weights, because = judged(model)
    assert weights == "trained"
    assert because == "13 of 13 tensors that start at 1 and 49 of 50 that start at 0 have moved."
    fresh = load(demo(), init=True).model
    assert judged(fresh) == ("fresh", "every one of 103 tensors has the constant or the spread it is initialised with.")


def test_what_the_loader_knows_is_believed_and_what_speaks_against_it_is_said():
    model = llama()
    assert judged(model, told=True) == ("fresh", "they were drawn at random when the model was built.")
    assert freshness(model, None, told=False) == ("trained", "they were read from a checkpoint.")
    weights, because = judged(model, told=False)
    assert weights == "trained"
    assert because.startswith("they were read from a checkpoint, though every one of ")


def test_without_reference_and_loader_nothing_is_known():
    weights, because = freshness(llama(), None)
    assert weights == "unknown"
    assert "no reference at initialisation" in because


def test_weights_of_the_reference_itself_are_fresh():
    twin = reinitialised(llama(), seed=1).model
    assert freshness(copy.deepcopy(twin), twin)[0] == "fresh"


@pytest.mark.parametrize("draw", ["normal_", "xavier_uniform_", "trunc_normal_", "orthogonal_"])
def test_another_way_of_drawing_is_no_training(draw):
    model = llama()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            seeded(lambda parameter=parameter: getattr(nn.init, draw)(parameter), hash(name) % 1000)
    weights, because = judged(model)
    assert weights == "fresh"
    assert because.startswith("0 of 5 tensors that start at 1 have moved, and the others are random draws; ")
    assert because.endswith("tensors have another spread or constant than the class's own.")


def test_scales_that_somebody_set_are_no_training():
    model = llama()
    with torch.no_grad():
        for layer in model.layers:
            layer.input_layernorm.weight.fill_(0.5)
    assert judged(model)[0] == "fresh"


def heavy(model):
    """Tails as trained matrices have, norms untouched: as of weights trained in bfloat16 at a small learning rate."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1 + torch.randn(parameter.shape, generator=generator).abs())
    return model


def test_distributions_that_nobody_draws_are_training():
    weights, because = judged(heavy(llama()))
    assert weights == "trained"
    assert because == (
        "0 of 5 tensors that start at 1 have moved, but 15 of 15 others have a distribution that no initialisation "
        "draws (excess kurtosis)."
    )


def test_where_nothing_starts_constant_another_spread_is_not_understood():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    seeded(lambda: [nn.init.normal_(p, std=0.5) for p in model.parameters()])
    weights, because = judged(model)
    assert weights == "unknown"
    assert because.startswith("4 of 4 tensors have another spread")


def test_one_bias_that_moved_among_many_is_not_understood():
    model = seeded(lambda: GPT2Model(GPT2Config(n_embd=64, n_layer=4, n_head=2, vocab_size=50, n_positions=32)))
    with torch.no_grad():
        model.ln_f.bias[0] = 0.1
    weights, because = judged(model)
    assert weights == "unknown"
    assert because.startswith("0 of 9 tensors that start at 1 and 1 of 25 that start at 0 have moved")


def test_small_tensors_say_nothing_of_their_spread():
    model = nn.Sequential(nn.Linear(7, 9))
    with torch.no_grad():
        model[0].weight.mul_(100)
    assert judged(model) == ("unknown", "no tensor could be compared with the reference at initialisation.")


def test_the_spread_is_that_of_the_whole_tensor_where_that_is_large():
    model, twin = (seeded(lambda: nn.Linear(4096, 512, bias=False), seed) for seed in (0, 1))
    assert freshness(model, twin)[0] == "fresh"
    with torch.no_grad():
        model.weight.mul_(1.03)
    assert freshness(model, twin)[0] == "unknown"


def test_false_alarms_of_the_spread_are_as_rare_as_six_deviations():
    width = 64
    for seed in range(40):
        model, twin = (seeded(lambda: nn.Sequential(*(nn.Linear(width, 2) for _ in range(20))), s) for s in (seed, 99))
        assert freshness(model, twin)[1].startswith("every one of 20 ")


def wrapped(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks models for what they call otherwise now
        return peft.get_peft_model(model, config)


def test_weights_under_an_adapter_are_compared_by_the_names_they_have_without():
    make = lambda: seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)))  # noqa: E731
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert judged(wrapped(make(), config))[0] == "fresh"
    trained = heavy(make())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.linspace(0, 0.1, parameter.shape[-1]))
    assert judged(wrapped(trained, config))[0] == "trained"


def test_plain_code_is_fresh_and_then_trained():
    model = seeded(PlainGPT)
    assert judged(model)[0] == "fresh"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(0, 1e-3, parameter.shape[-1]))
    assert judged(model)[0] == "trained"
