"""Models that do not read through norms everywhere: two stacks of which one does, and all blocks but the first."""

from __future__ import annotations

import kinds
import torch
import transformers as hf
from remedy_patients import Case, stir
from torch import nn


def two_stacks() -> Case:
    """A ViT of two blocks, which is pre-norm, with a BERT decoder of two, which is post-norm."""
    sizes = kinds.TEXT | {"num_hidden_layers": 2}
    images = {name: value for name, value in sizes.items() if name != "vocab_size"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = hf.ViTModel(hf.ViTConfig(**images, image_size=16, patch_size=4))
        decoder = hf.BertLMHeadModel(hf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
        model = hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return _case(model, {"pixel_values": pixels, "decoder_input_ids": kinds.ids(), "use_cache": False}, 4)


def modern() -> Case:
    """A ModernBERT, whose first block reads what the embedding has normalised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.ModernBertConfig(**kinds.TEXT | kinds.ENDS, cls_token_id=1, sep_token_id=2)
        model = hf.ModernBertModel(config)
    return _case(model, {"input_ids": kinds.ids()}, 3)


def _case(model: nn.Module, batch: dict[str, object], blocks: int) -> Case:
    stir(dict(model.named_parameters()), 0.2)
    return Case(model.double().eval(), batch, blocks)
