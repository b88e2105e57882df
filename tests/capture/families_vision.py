"""Images and video: flat and hierarchical, with windows, with pooled keys, with and without attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from family import IMAGE, family, floats
from seen import Case
from torch import nn

SMALL, LARGE = floats(2, 3, 16, 16), floats(2, 3, 32, 32)
WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
REDUCED = PYRAMID | {"sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
NONE = "no token attention was seen"


def image(
    model, blocks: str | list[str], projection: str, pixels: torch.Tensor = SMALL, *, heads: int = 4, **more
) -> Case:
    paths = [f"{blocks}.{index}" for index in range(2)] if isinstance(blocks, str) else blocks
    projections = {("vision", "self"): projection} if projection else {}
    return Case(model, {"pixel_values": pixels}, {"vision": paths}, {"vision": heads}, projections, **more)


def drawn(model: nn.Module, gain: float = 2.0) -> nn.Module:
    """Kernels of convolutions and learned positions large enough that attention behind them is not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 2:
                parameter.normal_(0, gain / parameter[0].numel() ** 0.5)
    return model


def stages(pattern: str, counts: tuple[int, ...] = (2, 2)) -> list[str]:
    return [pattern.format(stage, block) for stage, count in enumerate(counts) for block in range(count)]


def without_attention(model, blocks: list[str], pixels: torch.Tensor = LARGE, **more) -> Case:
    return Case(model, {"pixel_values": pixels}, {"backbone": blocks}, {}, {}, kernel=None, says=(NONE,), **more)


@family
def deit() -> Case:
    """Two extra tokens, class and distillation."""
    return image(hf.DeiTModel(hf.DeiTConfig(**IMAGE)), "layers", "attention.o_proj")


@family
def beit() -> Case:
    """Relative position bias of each block's own, scaled branches."""
    config = hf.BeitConfig(**IMAGE, use_relative_position_bias=True, out_indices=[0, 1])
    return image(hf.BeitModel(config), "layers", "attention.o_proj")


@family
def data2vec_vision() -> Case:
    """Relative position bias shared by all blocks."""
    config = hf.Data2VecVisionConfig(**IMAGE, use_shared_relative_position_bias=True, out_indices=[0, 1])
    return image(hf.Data2VecVisionModel(config), "encoder.layer", "attention.output.dense")


@family
def dinov3() -> Case:
    """Rotary over patches alone, registers."""
    return image(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE)), "model.layer", "attention.o_proj")


@family
def vit_mae() -> Case:
    """Three quarters of the patches are dropped at random."""
    case = image(hf.ViTMAEModel(hf.ViTMAEConfig(**IMAGE)), "layers", "attention.o_proj")
    case.batch["noise"] = floats(2, 16)
    return case


@family
def vit_msn() -> Case:
    """Image patches, class token."""
    return image(hf.ViTMSNModel(hf.ViTMSNConfig(**IMAGE)), "layers", "attention.o_proj")


@family
def ijepa() -> Case:
    """Image patches without a class token."""
    return image(hf.IJepaModel(hf.IJepaConfig(**IMAGE)), "layers", "attention.o_proj")


@family
def yolos() -> Case:
    """Detection tokens beside the patches."""
    config = hf.YolosConfig(**IMAGE | {"image_size": [16, 16]}, num_detection_tokens=3)
    return image(hf.YolosModel(config), "encoder.layer", "attention.output.dense")


@family
def dpt() -> Case:
    """Dense prediction from several depths."""
    outs, necks = [0, 1, 1, 1], [8, 8, 8, 8]
    config = hf.DPTConfig(**IMAGE, backbone_out_indices=outs, neck_hidden_sizes=necks, is_hybrid=False)
    return image(hf.DPTModel(config), "encoder.layer", "attention.output.dense")


@family
def vitdet() -> Case:
    """Channels before rows and columns, a window block and a global one, decomposed relative positions."""
    config = hf.VitDetConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        pretrain_image_size=16,
        patch_size=2,
        window_block_indices=[0],
        window_size=4,
        use_relative_position_embeddings=True,
    )
    told = ("no state between attention and MLP",)
    blocks, projection = "encoder.layer", "attention.proj"
    return image(
        hf.VitDetModel(config), blocks, projection, kernel="softmax", with_mid=False, with_read=False, says=told
    )


@family
def swinv2() -> Case:
    """Cosine scores with a learned temperature, norms after the branches; tokens change by stage."""
    model = hf.Swinv2Model(hf.Swinv2Config(**WINDOWS))
    blocks = stages("encoder.layers.{}.blocks.{}")
    return image(model, blocks, "attention.output.dense", LARGE, heads=2, kernel="softmax", with_read=False)


@family
def donut_swin() -> Case:
    """Shifted windows by hand; tokens change by stage."""
    model = hf.DonutSwinModel(hf.DonutSwinConfig(**WINDOWS))
    blocks = stages("encoder.layers.{}.blocks.{}")
    return image(model, blocks, "attention.output.dense", LARGE, heads=2, kernel="softmax")


@family
def maskformer_swin() -> Case:
    """Shifted windows by hand, states as tuples with their sizes."""
    model = hf.MaskFormerSwinModel(hf.MaskFormerSwinConfig(**WINDOWS))
    blocks = stages("encoder.layers.{}.blocks.{}")
    return image(model, blocks, "attention.output.dense", LARGE, heads=2, kernel="softmax")


@family
def hiera() -> Case:
    """Mask units, heads before windows; pooled queries where the stage changes, so that no state lies between."""
    config = hf.HieraConfig(
        embed_dim=16,
        image_size=[32, 32],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        depths=[1, 2],
        num_heads=[1, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
    )
    blocks = stages("encoder.stages.{}.layers.{}", (1, 2))
    of_stack = {"vision": {"with_mid": [1, 3]}}
    return image(hf.HieraModel(config), blocks, "", LARGE, heads=1, kernel="softmax", of_stack=of_stack)


@family
def pvt() -> Case:
    """Keys of a smaller image than the queries'; tokens change by stage."""
    sizes = PYRAMID | {"patch_sizes": [4, 2], "mlp_ratios": [2, 2], "num_attention_heads": [1, 2]}
    config = hf.PvtConfig(image_size=32, sequence_reduction_ratios=[2, 1], **sizes)
    blocks = stages("encoder.block.{}.{}")
    return image(hf.PvtModel(config), blocks, "attention.output.dense", LARGE, heads=1, kernel="softmax")


@family
def pvt_v2() -> Case:
    """Stages called one after the other, each over an image made of the tokens of the one before."""
    model = hf.PvtV2Model(hf.PvtV2Config(image_size=32, **REDUCED))
    return image(model, stages("encoder.layers.{}.blocks.{}"), "attention.proj", LARGE, heads=1, kernel="softmax")


@family
def segformer() -> Case:
    """Keys of a smaller image than the queries'; a convolution in the MLP."""
    model = hf.SegformerModel(hf.SegformerConfig(**REDUCED))
    return image(model, stages("stages.{}.blocks.{}"), "attention.o_proj", LARGE, heads=1)


@family
def mobilevit() -> Case:
    """Transformers between convolutions, over every fourth pixel."""
    config = hf.MobileViTConfig(
        image_size=128,
        patch_size=2,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=4,
    )
    blocks = [f"encoder.layer.{n}.transformer.layer.{m}" for n, count in ((2, 2), (3, 4), (4, 3)) for m in range(count)]
    return image(drawn(hf.MobileViTModel(config), 40.0), blocks, "", floats(2, 3, 128, 128), kernel="softmax")


@family
def levit() -> Case:
    """Stages of residual branches; several attentions in each, the last one shrinks the grid."""
    config = hf.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 4, 4],
        depths=[2, 1, 1],
        key_dim=[4, 4, 4],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
    )
    blocks = [f"encoder.stages.{stage}" for stage in range(3)]
    of_stack = {"vision": {"with_mid": [3]}}
    pixels = floats(2, 3, 64, 64)
    return image(
        hf.LevitModel(config), blocks, "", pixels, heads=2, kernel="softmax", with_read=False, of_stack=of_stack
    )


@family
def cvt() -> Case:
    """Queries and keys by convolution, fewer keys; a class token in the last stage alone."""
    pairs: dict[str, Any] = {name: [0.0, 0.0] for name in ("attention_drop_rate", "drop_rate", "drop_path_rate")}
    pairs |= {"kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}
    config = hf.CvtConfig(
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[16, 32],
        num_heads=[2, 4],
        depth=[1, 2],
        mlp_ratio=[2.0, 2.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        **pairs,
    )
    blocks = stages("encoder.stages.{}.layers.{}", (1, 2))
    return image(drawn(hf.CvtModel(config)), blocks, "attention.output.dense", LARGE, heads=2, kernel="softmax")


VIDEO = IMAGE | {"num_frames": 4}


@family
def vivit() -> Case:
    """Tubes of video."""
    model = hf.VivitModel(hf.VivitConfig(**VIDEO, tubelet_size=[2, 4, 4]))
    return image(model, "layers", "attention.o_proj", floats(2, 4, 3, 16, 16))


@family
def videomae() -> Case:
    """Tubes of video, fixed positions."""
    model = hf.VideoMAEModel(hf.VideoMAEConfig(**VIDEO, tubelet_size=2))
    return image(model, "encoder.layer", "attention.output.dense", floats(2, 4, 3, 16, 16))


@family
def timesformer() -> Case:
    """Two attentions in a block: over time, then over space."""
    model = hf.TimesformerModel(hf.TimesformerConfig(**VIDEO))
    told = ("no state between attention and MLP",)
    case = image(
        model,
        "encoder.layer",
        "temporal_attention.output.dense",
        floats(2, 4, 3, 16, 16),
        kernel="softmax",
        with_mid=False,
        with_read=False,
        says=told,
    )
    case.projections["vision", "self.1"] = "attention.output.dense"
    return case


@family
def convnext() -> Case:
    """Convolutions: states over samples."""
    config = hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
    return without_attention(hf.ConvNextModel(config), stages("encoder.stages.{}.layers.{}"), with_read=False)


@family
def resnet() -> Case:
    """Convolutions and batch norms: states over samples."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    return without_attention(hf.ResNetModel(config), stages("encoder.stages.{}.layers.{}"), with_read=False)


@family
def poolformer() -> Case:
    """Pooling in the place of attention: states over samples."""
    model = hf.PoolFormerModel(hf.PoolFormerConfig(**PYRAMID, padding=[2, 1]))
    return without_attention(model, stages("encoder.block.{}.{}"), with_read=False)


@family
def focalnet() -> Case:
    """Modulation by gathered context in the place of attention, over tokens."""
    config = hf.FocalNetConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], focal_levels=[2, 2], focal_windows=[3, 3]
    )
    return without_attention(hf.FocalNetModel(config), stages("encoder.stages.{}.layers.{}"))
