"""Every option of the reference transformer means what it says: against loops in float64."""

import pytest
import torch
from naive_zoo import Naive, batch_for, shaken

from fullrank.zoo import Transformer, TransformerConfig

SMALL = {"depth": 2, "width": 8, "heads": 4, "vocabulary": 11, "context": 8, "image": 6, "patch": 3, "channels": 2}
PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LEFT = PADDED.flip(1)

OPTIONS = [
    {},
    *[{"placement": name} for name in ("post", "peri", "res-post", "none")],
    *[{"placement": name, "parallel": True} for name in ("pre", "post", "peri", "res-post", "none")],
    *[{"norm": name, "placement": place} for name in ("rmsnorm", "batchnorm") for place in ("pre", "post", "peri")],
    {"norm": "none", "placement": "none"},
    {"placement": "none", "final_norm": True},
    {"placement": "pre", "final_norm": False},
    *[{"positions": name} for name in ("sinusoidal", "rotary", "none")],
    *[{"activation": name} for name in ("identity", "relu", "silu", "tanh")],
    {"gated": True, "activation": "silu"},
    {"gated": True, "biases": False, "norm": "rmsnorm"},
    {"mlp_width": 0},
    {"mlp_width": 0, "placement": "post"},
    {"mlp_width": 5},
    {"key_value_heads": 1},
    {"key_value_heads": 2, "positions": "rotary"},
    {"qk_norm": True},
    {"qk_norm": True, "positions": "rotary", "key_value_heads": 2},
    {"residual_scale": 0.3},
    {"residual_scale": -0.5, "skip_scale": 0.7, "placement": "post"},
    {"skip_scale": 0.0, "parallel": True},
    {"window": 3},
    {"window": 1},
    {"tie_embeddings": True},
    {"biases": False},
    {"classes": 3},
    {"classes": 3, "pooling": "first"},
    {"classes": 3, "pooling": "last"},
    {"weight_std": 0.02, "value_std": 2.0},
    {"dropout": 0.4},
]
POOLED = [{"classes": 2, "pooling": name} for name in ("mean", "first", "last")]
VISION = [
    {},
    {"class_token": True, "pooling": "first"},
    {"class_token": True, "positions": "sinusoidal"},
    {"positions": "rotary", "key_value_heads": 1},
    {"positions": "none", "biases": False},
    {"mask": "causal", "placement": "peri"},
    {"window": 3, "attention": "explicit"},
]


def named(options):
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"


def agrees(config, **more):
    model = shaken(Transformer(config))
    batch = batch_for(config) | more
    found, wanted = model(**batch).logits, Naive(model)(batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_it_computes_what_its_options_say(kind, options, attention):
    agrees(TransformerConfig(kind=kind, attention=attention, **SMALL | options))


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("mask", [PADDED, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, *POOLED, {"key_value_heads": 2}], ids=named)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_it_computes_what_its_options_say_of_padded_sequences(kind, options, mask, attention):
    agrees(TransformerConfig(kind=kind, attention=attention, **SMALL | options), attention_mask=mask)


@pytest.mark.parametrize("options", VISION, ids=named)
def test_it_reads_images_as_its_options_say(options):
    agrees(TransformerConfig(kind="vision", **SMALL | options))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_vectors_in_place_of_ids_are_the_stream(kind):
    config = TransformerConfig(kind=kind, **SMALL)
    model = shaken(Transformer(config))
    batch = {"inputs_embeds": torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
    torch.testing.assert_close(model(**batch).logits, Naive(model)(batch), rtol=0, atol=1e-10)
    ids = batch_for(config)["input_ids"]
    words = model.embedding.words.weight[ids]
    assert torch.equal(model(inputs_embeds=words).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "vision"])
def test_the_loss_is_the_mean_surprise_of_the_labels_that_count(kind):
    config = TransformerConfig(kind=kind, **SMALL)
    model = shaken(Transformer(config))
    batch = batch_for(config)
    labels = torch.tensor([1, 2]) if kind == "vision" else batch["input_ids"].clone()
    if kind != "vision":
        labels[0, 2:4] = -100
    logits, loss = model(**batch, labels=labels)
    terms = []
    for place in torch.cartesian_prod(*map(torch.arange, labels.shape)).reshape(-1, labels.ndim).tolist():
        label = int(labels[tuple(place)])
        before = [*place[:-1], place[-1] - 1] if kind == "decoder" else place
        if label != -100 and before[-1] >= 0:
            z = logits[tuple(before)]
            terms.append(torch.log(torch.exp(z).sum()) - z[label])
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=0, atol=1e-12)
    assert model(**batch).loss is None


def test_dropout_acts_in_training_alone():
    config = TransformerConfig(dropout=0.5, **SMALL)
    model, batch = Transformer(config), batch_for(config)
    plain = Transformer(config.with_(dropout=0.0))
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    assert not torch.allclose(model.train()(**batch).logits, plain.train()(**batch).logits)


def test_batch_norm_in_training_takes_the_tokens_of_a_batch_as_its_samples():
    config = TransformerConfig(norm="batchnorm", placement="post", mlp_width=0, **SMALL | {"depth": 1})
    model, batch = Transformer(config).double().train(), batch_for(config)
    seen = []
    model.blocks[0].after_attention.register_forward_hook(lambda module, given, made: seen.append(made))
    model(**batch)
    rows = seen[0].reshape(-1, 8)
    torch.testing.assert_close(rows.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(8).double(), rtol=1e-3, atol=0)
