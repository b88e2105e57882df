"""Models whose blocks are of several widths, and what is known of them without asking for names."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers as hf
from remedy_patients import Case, stir
from torch import Tensor, nn

import fullrank

STAGED = ("swin", "swinv2", "segformer")
_SWIN: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
}


def staged(name: str) -> Case:
    """One of two stages with two blocks each, of 16 and 32 features, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {
            "swin": lambda: hf.SwinModel(hf.SwinConfig(**_SWIN, window_size=4)),
            "swinv2": lambda: hf.Swinv2Model(hf.Swinv2Config(**_SWIN, window_size=4)),
            "segformer": lambda: hf.SegformerModel(hf.SegformerConfig(**_SEGFORMER)),
        }[name]()
    stir(dict(model.named_parameters()), 0.2)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return Case(model.double().eval(), {"pixel_values": images}, 4)


def last_maps(model: nn.Module) -> list[nn.Module]:
    """What computes last in each branch, attention before the MLP: its last linear map, or the norm behind that."""
    found: list[nn.Module] = []
    for block in model.modules():
        norms = [child for child in block.children() if isinstance(child, nn.LayerNorm)]
        linears = [one for one in block.modules() if isinstance(one, nn.Linear)]
        if len(norms) == 2 and len(linears) > 5:
            found += norms if "Swinv2" in type(block).__name__ else [linears[3], linears[-1]]
    return found


def repaired(case: Case, remedy: str, **parameters: Any) -> tuple[Tensor, list[list[Tensor]]]:
    """The answer of a repaired model, and for each branch what was added to it, stirred."""
    known = {id(p) for p in case.model.parameters()}
    with torch.no_grad(), fullrank.repair(case.model, remedy, batch=case.batch, **parameters) as repair:
        added = {n: p for n, p in case.model.named_parameters() if id(p) not in known}
        stir(added)
        places = [re.sub(r".*\((.*)\)", r"\1", place) for place in repair.applied[0].edit.where]
        kept = [[p.clone() for n, p in added.items() if n.startswith(f"{place}.")] for place in places]
        return case(), kept
