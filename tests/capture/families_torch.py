"""Torch's own modules and plain code, beside the models of a library."""

from __future__ import annotations

import torch
from family import family, floats
from plain import InPlaceBlock, ParallelBlock, PlainGPT, tokens
from seen import Case
from torch import nn


@family
def torch_encoder() -> Case:
    """nn.TransformerEncoder, tokens before sequences, post-norm."""
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    blocks = {"encoder": ["layers.0", "layers.1"]}
    return Case(model, {"src": floats(9, 3, 32)}, blocks, {"encoder": 4}, {}, with_read=False)


@family
def torch_decoder() -> Case:
    """nn.TransformerDecoder, cross-attention, norms before the branches."""
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, norm_first=True), 2)
    batch = {
        "tgt": floats(3, 7, 32),
        "memory": floats(3, 9, 32).flip(1),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
    }
    return Case(model, batch, {"decoder": ["layers.0", "layers.1"]}, {"decoder": 4}, {}, frozenset({"decoder"}))


@family
def torch_pair() -> Case:
    """nn.Transformer, tokens before sequences, post-norm."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, nn.LayerNorm(32), False)
    model = nn.Transformer(32, 4, 2, 2, 64, custom_encoder=encoder)
    blocks = {name: [f"{name}.layers.{i}" for i in range(2)] for name in ("encoder", "decoder")}
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    batch = {"src": floats(9, 3, 32), "tgt": floats(7, 3, 32), "tgt_mask": mask}
    heads = {"encoder": 4, "decoder": 4}
    return Case(model, batch, blocks, heads, {}, frozenset({"decoder"}), with_read=False)


def _plain(model: PlainGPT, **more) -> Case:
    blocks = {"decoder": [f"h.{i}" for i in range(3)]}
    projections = {("decoder", "self"): "attn.c_proj"}
    return Case(model, {"ids": tokens()}, blocks, {"decoder": 4}, projections, frozenset({"decoder"}), **more)


@family
def plain_code() -> Case:
    """Attention written by hand on the fused kernel."""
    return _plain(PlainGPT())


@family
def plain_softmax() -> Case:
    """Attention written by hand as a softmax between two products."""
    return _plain(PlainGPT(fused=False), kernel="softmax")


@family
def plain_in_place() -> Case:
    """Branches added in place."""
    return _plain(PlainGPT(block=InPlaceBlock))


@family
def plain_parallel() -> Case:
    """Attention and MLP in parallel, by hand."""
    return _plain(PlainGPT(block=ParallelBlock), with_mid=False)


class Residual(nn.Module):
    """A block over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Perceptron(nn.Module):
    """Residual blocks over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@family
def perceptron() -> Case:
    """No tokens: batch norms and residual branches over samples."""
    blocks = {"backbone": [f"blocks.{i}" for i in range(3)]}
    says = ("no token attention was seen",)
    return Case(Perceptron(), {"x": floats(6, 32)}, blocks, {}, {}, kernel=None, with_read=False, says=says)
