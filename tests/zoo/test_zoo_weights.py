"""Weights come from the seed alone, have the spreads that were asked for, and are saved as any module's."""

import io

import pytest
import torch
from naive_zoo import batch_for

from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig

CONFIGS = [
    TransformerConfig(depth=2),
    TransformerConfig(kind="decoder", depth=2, tie_embeddings=True, norm="batchnorm"),
    TransformerConfig(kind="vision", depth=2, class_token=True),
    StateSpaceConfig(depth=2),
]
IDS = ["encoder", "decoder", "vision", "state space"]


def made(config, **options):
    return (StateSpace if isinstance(config, StateSpaceConfig) else Transformer)(config, **options)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_seed_is_a_model(config):
    one, same, other = (made(config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_making_and_running_a_model_leaves_the_global_generator_alone(config):
    state = torch.random.get_rng_state()
    model = made(config).eval()
    batch = batch_for(config)
    model(**{name: value.float() if value.is_floating_point() else value for name, value in batch.items()})
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_drawing_again_with_the_generator_of_the_seed_is_the_model(config):
    model = made(config, seed=3)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_saved_model_is_the_model(config):
    model, other = made(config, seed=1).eval(), made(config, seed=2).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch_for(config).items()}
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert not torch.equal(made(config, seed=2).eval()(**batch).logits, model(**batch).logits)


STDS = {
    "attention.inner.query": ("qk_std", 64),
    "attention.inner.key": ("qk_std", 64),
    "attention.inner.value": ("value_std", 64),
    "attention.inner.output": ("output_std", 64),
    "mlp.inner.up": ("up_std", 64),
    "mlp.inner.gate": ("up_std", 64),
    "mlp.inner.down": ("down_std", 256),
}
FACTORS = {"qk_std": 2.0, "value_std": 0.5, "output_std": 3.0, "up_std": 0.1, "down_std": 0.0}


@pytest.mark.parametrize("common", [None, 0.02])
def test_standard_deviations_are_multiples_of_one_over_root_inputs_or_of_a_common_one(common):
    model = Transformer(TransformerConfig(gated=True, weight_std=common, head_std=0.3, embedding_std=0.7, **FACTORS))
    for part, (option, inputs) in STDS.items():
        W = torch.stack([block.get_submodule(part).weight.detach() for block in model.blocks])
        wanted = FACTORS[option] * (inputs**-0.5 if common is None else common)
        assert float(W.std()) == pytest.approx(wanted, rel=0.02), part
        assert float(W.mean()) == pytest.approx(0, abs=wanted * 0.05), part
    assert float(model.head.weight.detach().std()) == pytest.approx(
        0.3 * (0.125 if common is None else common), rel=0.02
    )
    assert float(model.embedding.words.weight.detach().std()) == pytest.approx(0.7, rel=0.02)
    assert float(model.embedding.positions.weight.detach().std()) == pytest.approx(0.7, rel=0.03)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert biases and not any(bool(value.any()) for value in biases)


def test_a_tied_head_is_the_embedding():
    model = Transformer(TransformerConfig(kind="decoder", tie_embeddings=True, embedding_std=0.02))
    assert model.head.weight is model.embedding.words.weight
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_gradients_reach_every_weight(config):
    model = made(config)
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch_for(config).items()}
    batch["labels"] = batch.get("input_ids", torch.tensor([1, 2]))
    model(**batch).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    of_keys = [name for name in missing if name.endswith("key.bias")]  # a constant in every row of the softmax
    assert missing == of_keys


def test_a_model_is_made_where_and_in_what_torch_was_told():
    with torch.device("meta"):
        assert all(p.is_meta for p in Transformer(TransformerConfig(depth=1)).parameters())
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = Transformer(TransformerConfig(depth=1), seed=5)
    finally:
        torch.set_default_dtype(kept)
    narrow = Transformer(TransformerConfig(depth=1), seed=5)
    assert wide.head.weight.dtype == torch.float64
    torch.testing.assert_close(wide.head.weight.float(), narrow.head.weight, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_model_compiles_into_one_graph(config):
    model = made(config).eval()
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch_for(config).items()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_model_runs_and_learns_under_autocast_and_in_bfloat16(config):
    model = made(config)
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch_for(config).items()}
    batch["labels"] = batch.get("input_ids", torch.tensor([1, 2]))
    exact = float(model.eval()(**batch).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(exact, rel=0.03)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.bfloat16()
    half = {name: v.bfloat16() if v.is_floating_point() else v for name, v in batch.items()}
    assert float(model(**half).loss.detach()) == pytest.approx(exact, rel=0.05)
