"""By what a model multiplies q·k, wherever its code does it, and what initialisations give W_Q to carry."""

import math

import pytest
import torch
import transformers as hf
from matrices import rms
from torch import nn
from torch.nn import functional

import fullrank
from fullrank.remedies.patient import Patient
from fullrank.remedies.weights.drawing import unscaled_queries
from fullrank.remedies.weights.score_scale import score_scales

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A block whose scores are made in one of the ways people write them, 4 heads of width 8."""

    def __init__(self, way):
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(32)
        self.q, self.k, self.v, self.o, self.up, self.down = (
            nn.Linear(*sizes) for sizes in ((32, 32),) * 4 + ((32, 64), (64, 32))
        )
        self.register_buffer("pool", torch.randn(6, 3))

    def attend(self, q, k, v):
        angle = torch.arange(q.shape[2]).to(q)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).to(q)

        def turn(x):
            a, b = x.chunk(2, -1)
            return (
                x * torch.cat([angle, angle], -1).cos() + torch.cat([-b, a], -1) * torch.cat([angle, angle], -1).sin()
            )

        match self.way:
            case "kernel":
                return functional.scaled_dot_product_attention(q, k, v)
            case "before":
                return functional.scaled_dot_product_attention(q * 8**-0.5, k, v, scale=1.0)
            case "both":
                return functional.scaled_dot_product_attention(turn(q * 0.5), turn(k * 3), v, scale=0.25)
            case "none":
                return torch.softmax(q @ k.mT, -1) @ v
            case "hand":
                position = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1)).to(q)
                s = (turn(q) @ turn(k).mT) * 0.7 + 5 * position + q @ torch.ones(8, 6).to(q)
                return torch.softmax(s.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf), -1) @ v
            case "normed":
                return functional.scaled_dot_product_attention(functional.normalize(q, dim=-1) * 8**0.5, k, v)
            case "pooled":
                pooled = self.pool.mT.to(q) @ q
                return self.pool.to(q) @ functional.scaled_dot_product_attention(pooled, k, v)
        raise ValueError(self.way)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (one(y).unflatten(-1, (4, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layers = nn.ModuleList(Block(way) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def built(way, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(way).to(dtype).eval(), {"x": torch.randn(3, 6, 32, dtype=dtype)}


def patient(model, batch):
    return Patient(model, lambda: model(**batch))


@pytest.mark.parametrize(
    ("way", "c"),
    [("kernel", 8**-0.5), ("before", 8**-0.5), ("both", 0.375), ("none", 1.0), ("hand", 0.7), ("normed", math.inf)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_factor_of_scores_is_found_wherever_it_stands(way, c, dtype):
    model, batch = built(way, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = score_scales(patient(model, batch))
    assert set(found) == {("encoder" if way != "hand" else "decoder", layer, "self") for layer in (1, 2)}
    for each in found.values():
        assert each == pytest.approx(c, rel={torch.bfloat16: 3e-2, torch.float32: 1e-4}.get(dtype, 1e-9))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("way", "carries"), [("kernel", 1), ("before", 1), ("both", 8**-0.5 / 0.375), ("none", 8**-0.5)]
)
@pytest.mark.parametrize("remedy", ["deepscale-init", "small-init?gamma=0.5", "orthogonal-init"])
def test_w_q_carries_what_is_missing_and_the_first_scores_are_as_with_a_scaling_kernel(way, carries, remedy):
    model, batch = built(way)
    with fullrank.repair(model, remedy, batch=batch) as repair:
        for layer in model.layers:
            assert rms(layer.q.weight.detach()) * 32**0.5 == pytest.approx(carries, rel=1e-9)
            assert rms(layer.k.weight.detach()) * 32**0.5 == pytest.approx(1, rel=1e-9)
        assert not any("scales its scores" in note for note in repair.notes)


def test_where_it_is_not_seen_a_note_says_so_and_what_the_kernel_is_told_counts():
    model, batch = built("pooled")
    assert set(score_scales(patient(model, batch)).values()) == {None}
    queries = unscaled_queries(patient(model, batch))
    assert "encoder layer 1 (self), encoder layer 2 (self)" in queries.notes[0]
    with fullrank.repair(model, "small-init", gamma=0.5, batch=batch) as repair:
        assert rms(model.layers[0].q.weight.detach()) * 32**0.5 == pytest.approx(1)
        assert any("How encoder layer 1 (self)" in note for note in repair.notes)


def test_a_norm_of_queries_leaves_nothing_to_carry_and_nothing_to_say():
    model, batch = built("normed")
    with fullrank.repair(model, "small-init", gamma=0.5, batch=batch) as repair:
        assert rms(model.layers[0].q.weight.detach()) * 32**0.5 == pytest.approx(1)
        assert not any("scales its scores" in note for note in repair.notes)


def opt():
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = hf.OPTModel(hf.OPTConfig(hidden_size=64, ffn_dim=64, word_embed_proj_dim=64, **sizes))
    attention = model.decoder.layers[0].self_attn
    return model, model.decoder.layers[0].self_attn_layer_norm, attention, 16**-0.5


def gpt_neo():
    config = hf.GPTNeoConfig(
        vocab_size=64, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        max_position_embeddings=64, window_size=12, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = hf.GPTNeoModel(config)
    return model, model.h[0].ln_1, model.h[0].attn.attention, 1.0


@pytest.mark.parametrize("build", [opt, gpt_neo])
@pytest.mark.parametrize("remedy", ["deepscale-init", "small-init?gamma=0.5", "orthogonal-init"])
def test_first_scores_of_models_that_scale_by_themselves_or_not_at_all_have_spread_one(build, remedy):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, norm, attention, c = build()
    batch = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad(), fullrank.repair(model.eval(), remedy, batch=batch):
        read = []
        norm.register_forward_hook(lambda module, args, output: read.append(output))
        model(**batch)
        q, k = (one(read[0]).view(2, 12, 4, 16).transpose(1, 2) for one in (attention.q_proj, attention.k_proj))
        assert float((c * q @ k.mT).std()) == pytest.approx(1, abs=0.2)
