"""What no model of the zoo can be, or read, is one clear sentence."""

import pytest
import torch

from fullrank.errors import BatchError, ContextError, FullrankError, ModelError
from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig

OPTIONS = [
    ({"kind": "both"}, "kind='both' must be one of 'encoder', 'decoder', 'vision'."),
    ({"norm": "layer"}, "norm='layer' must be one of 'layernorm', 'rmsnorm', 'batchnorm', 'none'."),
    ({"placement": "mid"}, "placement='mid' must be one of 'pre', 'post', 'peri', 'res-post', 'none'."),
    ({"mask": "local"}, "mask='local' must be one of 'full', 'causal'."),
    ({"attention": "flash"}, "attention='flash' must be one of 'fused', 'explicit'."),
    ({"positions": "alibi"}, "positions='alibi' must be one of 'learned', 'sinusoidal', 'rotary', 'none'."),
    ({"activation": "mish"}, "activation='mish' must be one of 'identity', 'relu', 'gelu', 'silu', 'tanh'."),
    ({"pooling": "max"}, "pooling='max' must be one of 'mean', 'first', 'last'."),
    ({"depth": 0}, "depth=0 must be a whole number of 1 or more."),
    ({"depth": 2.5}, "depth=2.5 must be a whole number of 1 or more."),
    ({"depth": True}, "depth=True must be a whole number of 1 or more."),
    ({"mlp_width": -1}, "mlp_width=-1 must be a whole number of 0 or more."),
    ({"heads": 3}, "heads=3 must be a divisor of width=64."),
    ({"key_value_heads": 3}, "key_value_heads=3 must be a divisor of heads=4."),
    ({"window": 0}, "window=0 must be a whole number of 1 or more."),
    ({"window": 4}, "window=4 must be odd under a full mask: as many keys before a query as after it."),
    ({"dropout": 1.0}, "dropout=1.0 must be a finite number of 0 or more below 1."),
    ({"qk_std": -1.0}, "qk_std=-1.0 must be a finite number of 0 or more."),
    ({"weight_std": float("nan")}, "weight_std=nan must be a finite number of 0 or more."),
    ({"residual_scale": float("inf")}, "residual_scale=inf must be a finite number."),
    ({"residual_scale": "half"}, "residual_scale='half' must be a finite number."),
    ({"gated": 1}, "gated=1 must be True or False."),
    ({"norm": "none"}, "norm='none' leaves nothing for placement='pre' or final_norm=False."),
    (
        {"positions": "rotary", "width": 12, "heads": 4},
        "positions='rotary' must be another than rotary where heads are 3 wide: pairs turn.",
    ),
    (
        {"positions": "sinusoidal", "width": 9, "heads": 3},
        "positions='sinusoidal' must be another than sinusoidal for width=9: pairs turn.",
    ),
    ({"parallel": True, "mlp_width": 0}, "parallel=True must be False without an MLP (mlp_width=0)."),
    ({"kind": "vision", "patch": 5}, "patch=5 must be a divisor of image=32."),
    ({"kind": "vision", "classes": 0}, "classes=0 must be 1 or more for vision."),
    ({"class_token": True}, "class_token=True must be False for text: pooling='first' reads its first token."),
    (
        {"tie_embeddings": True, "classes": 2},
        "tie_embeddings=True must be False where the head tells classes (2), not words.",
    ),
]
STATE_SPACE = [
    ({"write": "zoh"}, "write='zoh' must be one of 'convex', 'step'."),
    ({"norm": "batchnorm"}, "norm='batchnorm' must be one of 'layernorm', 'rmsnorm', 'none'."),
    ({"placement": "peri"}, "placement='peri' must be one of 'pre', 'post', 'none'."),
    ({"states": 0}, "states=0 must be a whole number of 1 or more."),
    ({"steps": (0.1, 0.01)}, "steps=(0.1, 0.01) must be two rising numbers above 0 and below 10."),
    ({"gate": "silu"}, "gate='silu' must be True or False."),
    ({"skip_scale": float("nan")}, "skip_scale=nan must be a finite number."),
    ({"norm": "none"}, "norm='none' leaves nothing for placement='pre' or final_norm=False."),
]


@pytest.mark.parametrize("options, sentence", OPTIONS, ids=[sentence[:40] for _, sentence in OPTIONS])
def test_an_impossible_transformer_is_one_sentence(options, sentence):
    with pytest.raises(ModelError) as caught:
        TransformerConfig(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("options, sentence", STATE_SPACE, ids=[sentence[:40] for _, sentence in STATE_SPACE])
def test_an_impossible_state_space_is_one_sentence(options, sentence):
    with pytest.raises(ModelError) as caught:
        StateSpaceConfig(**options)
    assert str(caught.value) == sentence


IDS = torch.zeros(2, 6, dtype=torch.long)
INPUTS = [
    ({}, BatchError, "the model was given nothing; pass one of input_ids, pixel_values, inputs_embeds."),
    (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 64)},
        BatchError,
        "the model was given input_ids and inputs_embeds; pass one of input_ids, pixel_values, inputs_embeds.",
    ),
    (
        {"pixel_values": torch.zeros(2, 3, 32, 32)},
        BatchError,
        "pixel_values was given to a model of kind='encoder', which reads input_ids.",
    ),
    ({"input_ids": IDS[0]}, BatchError, "input_ids has the shape (6,); expected (sequences, tokens)."),
    (
        {"inputs_embeds": torch.zeros(2, 6, 3)},
        BatchError,
        "inputs_embeds has the shape (2, 6, 3); expected (sequences, tokens, 64).",
    ),
    (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
        BatchError,
        "attention_mask has the shape (2, 5); the tokens have (2, 6).",
    ),
    (
        {"input_ids": torch.zeros(1, 129, dtype=torch.long)},
        ContextError,
        "input_ids has 129 tokens, and this model learned 128 positions.",
    ),
    ({"input_ids": IDS, "labels": IDS[:, :3]}, BatchError, "labels have the shape (2, 3); expected (2, 6)."),
]


@pytest.mark.parametrize("batch, kind, sentence", INPUTS, ids=[sentence[:40] for _, _, sentence in INPUTS])
def test_what_a_model_cannot_read_is_one_sentence(batch, kind, sentence):
    with pytest.raises(kind) as caught:
        Transformer(TransformerConfig(depth=1))(**batch)
    assert str(caught.value) == sentence


def test_an_image_of_another_size_is_one_sentence():
    with pytest.raises(BatchError) as caught:
        Transformer(TransformerConfig(kind="vision", depth=1))(pixel_values=torch.zeros(2, 3, 16, 16))
    assert str(caught.value) == "pixel_values has the shape (2, 3, 16, 16); expected (sequences, 3, 32, 32)."


def test_a_state_space_refuses_masks_of_another_shape():
    with pytest.raises(FullrankError, match="attention_mask has the shape"):
        StateSpace(StateSpaceConfig(depth=1))(input_ids=IDS, attention_mask=torch.ones(2, 5))


def test_an_option_that_is_none_is_named_with_those_that_are():
    with pytest.raises(ModelError, match="'layers' is no option of a transformer: it has kind, depth, width"):
        TransformerConfig().with_(layers=3)


def test_what_was_derived_follows_what_it_was_derived_from():
    found = TransformerConfig().with_(width=32, heads=2, kind="decoder")
    assert (found.mlp_width, found.key_value_heads, found.mask) == (128, 2, "causal")
    kept = TransformerConfig(mlp_width=100, key_value_heads=2, mask="full", final_norm=False)
    kept = kept.with_(width=32, kind="decoder", placement="post")
    assert (kept.mlp_width, kept.key_value_heads) == (100, 2)
    assert (TransformerConfig().with_(placement="post").final_norm, TransformerConfig().final_norm) == (False, True)
