"""Encoder and decoder: cross-attention, relative positions, local attention, experts, object queries."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family import ENDS, PAIR, TEXT, family, floats, ids, pair
from seen import Case

RELATIVE: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
RELATIVE_PARTS = ("block", "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o")
LEARNED: dict[str, Any] = PAIR | ENDS | {"max_position_embeddings": 32}
LEARNED_PARTS = ("layers", "self_attn.out_proj", "encoder_attn.out_proj")
BOTH = {"input_ids": ids(), "decoder_input_ids": ids(3, 7)}


@family
def mt5() -> Case:
    """Relative bias of the first block's, for all."""
    return pair(hf.MT5Model(hf.MT5Config(**RELATIVE)), *RELATIVE_PARTS, BOTH)


@family
def umt5() -> Case:
    """Relative bias of each block's own."""
    return pair(hf.UMT5Model(hf.UMT5Config(**RELATIVE)), *RELATIVE_PARTS, BOTH)


def _long(kind: str) -> Case:
    config = hf.LongT5Config(**RELATIVE, local_radius=4, global_block_size=4, encoder_attention_type=kind)
    case = pair(hf.LongT5Model(config), *RELATIVE_PARTS, BOTH, kernel="softmax")
    del case.projections["encoder", "self"]  # its blocks of tokens are put together again, and padding is cut off
    return case


@family
def longt5_local() -> Case:
    """Blocks of tokens that see their two neighbours."""
    return _long("local")


@family
def longt5_global() -> Case:
    """Blocks of tokens that see their two neighbours and a summary of every block."""
    return _long("transient-global")


@family
def pegasus() -> Case:
    """Sinusoidal positions, norms before the branches."""
    return pair(hf.PegasusModel(hf.PegasusConfig(**LEARNED)), *LEARNED_PARTS, BOTH)


@family
def mbart() -> Case:
    """Learned positions, norms before the branches."""
    return pair(hf.MBartModel(hf.MBartConfig(**LEARNED)), *LEARNED_PARTS, BOTH)


@family
def blenderbot() -> Case:
    """Learned positions, norms before the branches."""
    return pair(hf.BlenderbotModel(hf.BlenderbotConfig(**LEARNED)), *LEARNED_PARTS, BOTH)


@family
def m2m_100() -> Case:
    """Many languages, norms before the branches."""
    return pair(hf.M2M100Model(hf.M2M100Config(**LEARNED, decoder_start_token_id=2)), *LEARNED_PARTS, BOTH)


@family
def marian() -> Case:
    """Norms after the branches."""
    model = hf.MarianModel(hf.MarianConfig(**LEARNED, decoder_start_token_id=2))
    return pair(model, *LEARNED_PARTS, BOTH, with_read=False)


@family
def nllb_moe() -> Case:
    """Experts in every other block of both stacks."""
    config = hf.NllbMoeConfig(
        **LEARNED, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, decoder_start_token_id=2
    )
    parts = ("layers", "self_attn.out_proj", "cross_attention.out_proj")
    return pair(hf.NllbMoeModel(config), *parts, BOTH, kernel="softmax")


@family
def prophetnet() -> Case:
    """Two predicting streams after the main one: two self-attentions in a block, and cross-attention."""
    config = hf.ProphetNetConfig(
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=50,
        ngram=2,
        **ENDS,
    )
    model = hf.ProphetNetModel(config)
    case = pair(model, "layers", "", "cross_attn.out_proj", BOTH, kernel="softmax", with_read=False)
    case.projections = {("encoder", "self"): "self_attn.out_proj", ("decoder", "cross"): "cross_attn.out_proj"}
    case.causal = frozenset()  # the predicting streams see the main one and themselves
    return case


@family
def led() -> Case:
    """Banded attention in the encoder, which cannot be read; the decoder's is plain."""
    sizes = PAIR | ENDS | {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
    told = ("a softmax in the blocks of encoder is not multiplied with values as a plain product",)
    model = hf.LEDModel(hf.LEDConfig(**sizes, attention_window=[4, 4]))
    case = pair(model, *LEARNED_PARTS, BOTH, kernel="softmax", with_read=False, says=told)
    del case.projections["encoder", "self"], case.heads["encoder"]
    return case


@family
def t5gemma() -> Case:
    """Grouped queries, soft-capped scores, sliding windows."""
    half = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    model = hf.T5GemmaModel(hf.T5GemmaConfig(encoder=half, decoder=half, vocab_size=50))
    return pair(model, "layers", "self_attn.o_proj", "cross_attn.o_proj", BOTH, kernel="softmax")


def _detector(model) -> Case:
    case = pair(model, "layers", "self_attn.o_proj", "encoder_attn.o_proj", {}, with_read=False)
    case.batch = {"pixel_values": floats(2, 3, 32, 32)}
    for field in (case.blocks, case.heads):
        field["vision"] = field.pop("encoder")
    case.projections["vision", "self"] = case.projections.pop(("encoder", "self"))
    case.causal = frozenset()
    return case


def _objects() -> dict[str, Any]:
    sizes = {name: value for name, value in PAIR.items() if name != "vocab_size"}
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return sizes | {"num_queries": 5, "backbone_config": backbone}


@family
def detr() -> Case:
    """Object queries attend to an image that convolutions have made tokens of."""
    return _detector(hf.DetrModel(hf.DetrConfig(**_objects())))


@family
def conditional_detr() -> Case:
    """Object queries, content and place beside each other in queries and keys."""
    return _detector(hf.ConditionalDetrModel(hf.ConditionalDetrConfig(**_objects())))
