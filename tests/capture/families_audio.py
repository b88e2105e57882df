"""Sound: waves and spectrograms, read by encoders and by pairs of stacks."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family import ENDS, PAIR, TEXT, family, floats, ids, pair
from seen import Case

WAVE: dict[str, Any] = TEXT | {
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}


def wave(model, projection: str, samples: int = 200, **more) -> Case:
    blocks = {"encoder": ["encoder.layers.0", "encoder.layers.1"]}
    projections = {("encoder", "self"): projection} if projection else {}
    batch = {"input_values": floats(2, samples)}
    return Case(model, batch, blocks, {"encoder": 4}, projections, **more)


@family
def wav2vec2() -> Case:
    """Convolutions make the tokens; norms after the branches."""
    return wave(hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)), "attention.out_proj", with_read=False)


@family
def wav2vec2_stable() -> Case:
    """Convolutions make the tokens; norms before the branches."""
    config = hf.Wav2Vec2Config(**WAVE, do_stable_layer_norm=True, feat_extract_norm="layer")
    return wave(hf.Wav2Vec2Model(config), "attention.out_proj")


@family
def hubert() -> Case:
    """Convolutions make the tokens."""
    return wave(hf.HubertModel(hf.HubertConfig(**WAVE)), "attention.out_proj", with_read=False)


@family
def wavlm() -> Case:
    """Gated relative positions, through torch's own multi-head function."""
    return wave(hf.WavLMModel(hf.WavLMConfig(**WAVE)), "", kernel="softmax", with_read=False)


@family
def sew() -> Case:
    """Tokens are squeezed in time before the blocks."""
    return wave(hf.SEWModel(hf.SEWConfig(**WAVE, squeeze_factor=2)), "attention.out_proj", 400, with_read=False)


@family
def ast() -> Case:
    """Patches of a spectrogram."""
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    config = hf.ASTConfig(**sizes, patch_size=4, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=12)
    blocks = {"encoder": ["layers.0", "layers.1"]}
    batch = {"input_values": floats(2, 24, 12)}
    return Case(hf.ASTModel(config), batch, blocks, {"encoder": 4}, {("encoder", "self"): "attention.o_proj"})


@family
def speech_to_text() -> Case:
    """Encoder and decoder; convolutions shorten the sound."""
    config = hf.Speech2TextConfig(
        **PAIR, **ENDS, input_feat_per_channel=8, conv_channels=16, max_source_positions=40, max_target_positions=20
    )
    batch = {"input_features": floats(2, 24, 8), "decoder_input_ids": ids(2, 7)}
    own, cross = "self_attn.out_proj", "encoder_attn.out_proj"
    return pair(hf.Speech2TextModel(config), "layers", own, cross, batch, kernel="softmax")


@family
def moonshine() -> Case:
    """Encoder and decoder over raw waves, rotary."""
    config = hf.MoonshineConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_start_token_id=1,
        **ENDS,
    )
    batch = {"input_values": floats(2, 3000), "decoder_input_ids": ids(2, 7)}
    return pair(hf.MoonshineModel(config), "layers", "self_attn.o_proj", "encoder_attn.o_proj", batch)


@family
def clap() -> Case:
    """Two towers: windows over a spectrogram, tokens changing by stage, and text."""
    audio = {
        "window_size": 2,
        "num_mel_bins": 16,
        "spec_size": 32,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "enable_fusion": False,
        "projection_dim": 16,
    }
    config = hf.ClapConfig(text_config=TEXT | {"max_position_embeddings": 20}, audio_config=audio, projection_dim=16)
    sound = [f"audio_model.audio_encoder.layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)]
    return Case(
        hf.ClapModel(config),
        {"input_ids": ids(2), "input_features": floats(2, 1, 32, 16)},
        {"encoder": sound, "encoder.1": [f"text_model.encoder.layer.{i}" for i in range(2)]},
        {"encoder": 2, "encoder.1": 4},
        {("encoder", "self"): "attention.output.dense", ("encoder.1", "self"): "attention.output.dense"},
        kernel="softmax",
        of_stack={"encoder.1": {"with_read": False}},
    )
