"""Several kinds of input at once: two towers, queries into an image, cross-attention in a decoder, joint streams."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families_vision import drawn
from family import ENDS, IMAGE, TEXT, family, floats, ids
from seen import Case

PIXELS = floats(2, 3, 16, 16)


def two(path: str) -> list[str]:
    return [f"{path}.0", f"{path}.1"]


def together(model, blocks: dict[str, str], projections: dict[str, str], batch: dict[str, Any], **more) -> Case:
    """Two blocks of four heads in every stack; projections by `stack part`."""
    paths = {name: two(path) for name, path in blocks.items()}
    found = {tuple(where.split()): inside for where, inside in projections.items()}
    return Case(model, batch, paths, dict.fromkeys(blocks, 4), found, **more)  # type: ignore[arg-type]


def after_images(tokens: int, sequences: int = 2) -> torch.Tensor:
    """Token ids that begin with places for an image's tokens."""
    return torch.cat([torch.full((sequences, tokens), 3), (ids(sequences) + 4).clamp(max=49)], 1)


@family
def siglip() -> Case:
    """Two towers, text in both directions; a pooling attention outside the blocks."""
    config = hf.SiglipConfig(text_config=TEXT | {"max_position_embeddings": 16}, vision_config=IMAGE)
    return together(
        hf.SiglipModel(config),
        {"vision": "vision_model.encoder.layers", "encoder": "text_model.encoder.layers"},
        {"vision self": "self_attn.out_proj", "encoder self": "self_attn.out_proj"},
        {"input_ids": ids(2), "pixel_values": PIXELS},
        says=("attention in vision_model.head.attention, outside of the blocks, is not reported",),
    )


@family
def siglip2() -> Case:
    """Two towers, images of any size as padded patches."""
    vision = {name: value for name, value in IMAGE.items() if name != "image_size"} | {"num_patches": 16}
    config = hf.Siglip2Config(text_config=TEXT | {"max_position_embeddings": 16}, vision_config=vision)
    batch = {
        "input_ids": ids(2),
        "pixel_values": floats(2, 16, 48),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
        "spatial_shapes": torch.tensor([[4, 4], [4, 3]]),
    }
    return together(
        hf.Siglip2Model(config),
        {"vision": "vision_model.encoder.layers", "encoder": "text_model.encoder.layers"},
        {"vision self": "self_attn.out_proj", "encoder self": "self_attn.out_proj"},
        batch,
        says=("outside of the blocks",),
    )


@family
def altclip() -> Case:
    """Two towers; the text one has its norms after the branches."""
    text = TEXT | {"project_dim": 16, "max_position_embeddings": 20}
    model = hf.AltCLIPModel(hf.AltCLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))
    return together(
        model,
        {"vision": "vision_model.encoder.layers", "encoder": "text_model.roberta.encoder.layers"},
        {"vision self": "self_attn.out_proj", "encoder self": "attention.output.dense"},
        {"input_ids": ids(2), "pixel_values": PIXELS},
        of_stack={"encoder": {"with_read": False}},
    )


@family
def blip() -> Case:
    """Two towers by hand; fused queries, keys and values in the one for images."""
    text = TEXT | ENDS | {"encoder_hidden_size": 32, "projection_dim": 16, "is_decoder": False}
    config = hf.BlipConfig(text_config=text, vision_config=IMAGE, projection_dim=16, image_text_hidden_size=16)
    return together(
        drawn(hf.BlipModel(config)),
        {"vision": "vision_model.encoder.layers", "encoder": "text_model.encoder.layer"},
        {"vision self": "self_attn.projection", "encoder self": "attention.output.dense"},
        {"input_ids": ids(2), "pixel_values": PIXELS},
        kernel="softmax",
        of_stack={"encoder": {"with_read": False}},
    )


@family
def blip2() -> Case:
    """Learned queries attend to an image, then stand before the text of a causal decoder."""
    told = ("no state between attention and MLP could be told in decoder:",)
    opt = hf.OPTConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        **ENDS,
    )
    queries = TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = hf.Blip2Config(
        vision_config=IMAGE, qformer_config=queries, text_config=opt, num_query_tokens=4, image_token_index=3
    )
    blocks = {
        "vision": "vision_model.encoder.layers",
        "decoder": "qformer.encoder.layer",
        "decoder.1": "language_model.model.decoder.layers",
    }
    projections = {
        "vision self": "self_attn.projection",
        "decoder self": "attention.output.dense",
        "decoder cross": "crossattention.output.dense",
        "decoder.1 self": "self_attn.out_proj",
    }
    batch = {"input_ids": after_images(4), "pixel_values": PIXELS}
    return together(
        drawn(hf.Blip2Model(config)),
        blocks,
        projections,
        batch,
        causal=frozenset({"decoder.1"}),
        of_stack={"decoder": {"with_mid": False, "with_read": False}},
        says=told,
    )


@family
def flava() -> Case:
    """Two towers and a third stack over both of them."""
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    config = hf.FlavaConfig(
        image_config=IMAGE, text_config=TEXT, multimodal_config=sizes, hidden_size=32, projection_dim=16
    )
    return together(
        hf.FlavaModel(config),
        {
            "vision": "image_model.encoder.layer",
            "encoder": "text_model.encoder.layer",
            "encoder.1": "multimodal_model.encoder.layer",
        },
        {f"{name} self": "attention.output.dense" for name in ("vision", "encoder", "encoder.1")},
        {"input_ids": ids(2), "pixel_values": PIXELS},
        kernel="softmax",
    )


@family
def llava() -> Case:
    """Image tokens stand in the text of a causal decoder."""
    vision = hf.CLIPVisionConfig(**IMAGE)
    text = hf.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    return together(
        hf.LlavaModel(config),
        {"vision": "vision_tower.encoder.layers", "decoder": "language_model.layers"},
        {"vision self": "self_attn.out_proj", "decoder self": "self_attn.o_proj"},
        {"input_ids": after_images(16), "pixel_values": PIXELS, "use_cache": False},
        causal=frozenset({"decoder"}),
    )


@family
def paligemma() -> Case:
    """Image tokens and prompt see each other: the language model looks ahead."""
    vision = hf.SiglipVisionConfig(**IMAGE, vision_use_head=False)
    text = hf.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8)
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, image_token_id=3)
    return together(
        hf.PaliGemmaModel(config),
        {"vision": "vision_tower.encoder.layers", "encoder": "language_model.layers"},
        {"vision self": "self_attn.out_proj", "encoder self": "self_attn.o_proj"},
        {"input_ids": after_images(16), "pixel_values": PIXELS, "use_cache": False},
    )


@family
def qwen2_vl() -> Case:
    """Patches of all images in one row, without a batch axis; rotary in three directions."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    batch = {
        "input_ids": after_images(4, 1),
        "pixel_values": floats(16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * 9]),
        "use_cache": False,
    }
    return together(
        hf.Qwen2VLModel(config),
        {"vision": "visual.blocks", "decoder": "language_model.layers"},
        {"vision self": "attn.proj", "decoder self": "self_attn.o_proj"},
        batch,
        causal=frozenset({"decoder"}),
    )


@family
def git() -> Case:
    """Text sees the whole image and its own past."""
    return together(
        hf.GitModel(hf.GitConfig(vision_config=IMAGE, **TEXT, **ENDS)),
        {"vision": "image_encoder.vision_model.encoder.layers", "encoder": "encoder.layer"},
        {"vision self": "self_attn.out_proj", "encoder self": "attention.output.dense"},
        {"input_ids": ids(2), "pixel_values": PIXELS, "use_cache": False},
        kernel="softmax",
        of_stack={"encoder": {"with_read": False}},
    )


@family
def vilt() -> Case:
    """Text and patches are one row of tokens."""
    model = hf.ViltModel(hf.ViltConfig(**TEXT, image_size=16, patch_size=4, max_image_length=-1))
    batch = {"input_ids": ids(2), "pixel_values": PIXELS}
    projections = {"encoder self": "attention.output.dense"}
    return together(model, {"encoder": "encoder.layer"}, projections, batch, kernel="softmax")


@family
def idefics() -> Case:
    """Blocks of two lists take turns on one stream: cross-attention to the image, then self-attention."""
    vision = {"embed_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.IdeficsConfig(
        **TEXT,
        **ENDS,
        cross_layer_interval=1,
        use_resampler=False,
        additional_vocab_size=0,
        vision_config=vision | {"image_size": 16, "patch_size": 4},
    )
    batch = {
        "input_ids": ids(2),
        "pixel_values": PIXELS.unsqueeze(1),
        "image_attention_mask": torch.ones(2, 9, 1, dtype=torch.int64),
        "use_cache": False,
    }
    case = together(
        hf.IdeficsModel(config),
        {"vision": "vision_model.encoder.layers", "decoder": "layers"},
        {"vision self": "self_attn.out_proj", "decoder self": "self_attn.o_proj", "decoder cross": "cross_attn.o_proj"},
        batch,
        causal=frozenset({"decoder"}),
    )
    case.blocks["decoder"] = ["gated_cross_attn_layers.0", "layers.0", "gated_cross_attn_layers.1", "layers.1"]
    return case


@family
def mllama() -> Case:
    """Local and global image blocks; a decoder in which some blocks have cross-attention alone."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | ENDS | {"num_hidden_layers": 3, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 64, "vision_output_dim": 64, "image_size": 16, "patch_size": 4}
    config = hf.MllamaConfig(
        text_config=text | {"cross_attention_layers": [1], "max_position_embeddings": 32},
        vision_config=vision
        | {"max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
    )
    batch = {
        "input_ids": ids(2),
        "pixel_values": floats(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(2, 9, 1, 1, dtype=torch.int64),
        "use_cache": False,
    }
    case = together(
        hf.MllamaModel(config),
        {"vision": "vision_model.transformer.layers", "vision.1": "", "decoder": ""},
        {
            "vision self": "self_attn.o_proj",
            "vision.1 self": "self_attn.o_proj",
            "decoder self": "self_attn.o_proj",
            "decoder cross": "cross_attn.o_proj",
        },
        batch,
        causal=frozenset({"decoder"}),
    )
    case.blocks["vision.1"] = ["vision_model.global_transformer.layers.0"]
    case.blocks["decoder"] = [f"language_model.layers.{layer}" for layer in range(3)]
    return case
