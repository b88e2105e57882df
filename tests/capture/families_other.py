"""Families beyond text: images, sound, pairs of stacks, state spaces."""

from __future__ import annotations

import torch
import transformers as hf
from family import ENDS, IMAGE, PAIR, TEXT, family, floats, ids, pair, text
from seen import Case


@family
def vit() -> Case:
    """Image patches, class token."""
    model = hf.ViTModel(hf.ViTConfig(**IMAGE))
    batch = {"pixel_values": floats(2, 3, 16, 16)}
    return Case(
        model, batch, {"vision": ["layers.0", "layers.1"]}, {"vision": 4}, {("vision", "self"): "attention.o_proj"}
    )


@family
def swin() -> Case:
    """Shifted windows, token count and width change by stage."""
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    blocks = [f"encoder.layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)]
    batch = {"pixel_values": floats(2, 3, 32, 32)}
    return Case(
        hf.SwinModel(config), batch, {"vision": blocks}, {"vision": 2}, {("vision", "self"): "attention.o_proj"}
    )


@family
def clip() -> Case:
    """Two towers: images and causal text."""
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))
    return Case(
        model,
        {"input_ids": ids(2), "pixel_values": floats(2, 3, 16, 16)},
        {
            "vision": [f"vision_model.encoder.layers.{i}" for i in range(2)],
            "decoder": [f"text_model.encoder.layers.{i}" for i in range(2)],
        },
        {"vision": 4, "decoder": 4},
        {("vision", "self"): "self_attn.out_proj", ("decoder", "self"): "self_attn.out_proj"},
        frozenset({"decoder"}),
    )


@family
def t5() -> Case:
    """Encoder and decoder, relative bias, cross-attention, no scale."""
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    batch = {
        "input_ids": ids(),
        "decoder_input_ids": ids(3, 7),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 9]),
    }
    return pair(hf.T5Model(config), "block", "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", batch)


@family
def bart() -> Case:
    """Encoder and decoder, cross-attention, post-norm."""
    config = hf.BartConfig(**PAIR, **ENDS, decoder_start_token_id=1, forced_eos_token_id=2)
    batch = {"input_ids": ids(), "decoder_input_ids": ids(3, 7)}
    return pair(hf.BartModel(config), "layers", "self_attn.out_proj", "encoder_attn.out_proj", batch, with_read=False)


@family
def whisper() -> Case:
    """Encoder and decoder over sound, cross-attention."""
    config = hf.WhisperConfig(
        **PAIR,
        **ENDS,
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    batch = {"input_features": floats(2, 8, 20), "decoder_input_ids": ids(2, 7)}
    return pair(hf.WhisperModel(config), "layers", "self_attn.out_proj", "encoder_attn.out_proj", batch)


@family
def switch() -> Case:
    """Encoder and decoder, switched experts, relative bias."""
    config = hf.SwitchTransformersConfig(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        vocab_size=50,
    )
    batch = {"input_ids": ids(), "decoder_input_ids": ids(3, 7)}
    model = hf.SwitchTransformersModel(config)
    own, cross = "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"
    return pair(model, "block", own, cross, batch, kernel="softmax")


@family
def jamba() -> Case:
    """State-space and attention blocks in turn, experts."""
    config = hf.JambaConfig(
        **TEXT,
        num_key_value_heads=2,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
    )
    return text(hf.JambaModel(config), "layers", "self_attn.o_proj")


@family
def dinov2() -> Case:
    """Image patches, scaled branches."""
    config = hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    blocks = {"vision": ["encoder.layer.0", "encoder.layer.1"]}
    batch = {"pixel_values": floats(2, 3, 16, 16)}
    return Case(hf.Dinov2Model(config), batch, blocks, {"vision": 4}, {("vision", "self"): "attention.o_proj"})
