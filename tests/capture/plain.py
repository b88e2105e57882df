"""Transformers in plain torch: no names to lean on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention as in nanoGPT, through the fused function or by hand."""

    def __init__(self, width: int, heads: int, *, fused: bool, causal: bool = True) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads, self.fused, self.causal = heads, fused, causal

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (y.view(sequences, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            s = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if self.causal:
                hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
                s = s.masked_fill(hidden, float("-inf"))
            p = functional.softmax(s, dim=-1)
            y = functional.dropout(p, 0.0, self.training) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(sequences, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, **options: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, **options)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class InPlaceBlock(Block):
    """The same additions, written into the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attn(self.ln_1(x))
        x += self.mlp(self.ln_2(x))
        return x


class ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y) + self.mlp(y)


class PlainGPT(nn.Module):
    """nanoGPT without its training loop."""

    def __init__(self, *, layers: int = 3, block: type[Block] = Block, fused: bool = True, causal: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.h = nn.ModuleList(block(32, 4, fused=fused, causal=causal) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(32), nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


class SoftmaxAttention(nn.Module):
    """Attention by hand in one of the ways people write it; each folds heads and sequences differently."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.o, self.way = nn.Linear(32, 96), nn.Linear(32, 32), way

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(sequences, tokens, 3, 4, 8).unbind(2)  # (sequences, tokens, heads, width)
        if self.way == "einsum":
            p = (torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5).softmax(-1)
            y = torch.einsum("bhts,bshd->bthd", p, v)
        elif self.way == "values first":
            p = torch.einsum("bthd,bshd->bhts", q, k).softmax(dim=-1)
            y = torch.einsum("bshd,bhts->bthd", v, p)
        elif self.way == "folded":
            q, k, v = (z.transpose(1, 2).reshape(sequences * 4, tokens, 8) for z in (q, k, v))
            p = torch.softmax(torch.bmm(q, k.mT), -1)
            y = torch.bmm(p, v).view(sequences, 4, tokens, 8).transpose(1, 2)
        elif self.way == "module":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            p = nn.Softmax(dim=-1)(q @ k.mT)
            y = torch.matmul(p.to(torch.float32), v).transpose(1, 2)
        elif self.way == "one head":
            q, k, v = (z.flatten(2) for z in (q, k, v))
            y = (q @ k.mT / 32**0.5).softmax(-1) @ v
        elif self.way == "sink column":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            s = torch.cat([q @ k.mT, torch.full((sequences, 4, tokens, 1), 0.5)], -1)
            y = (s.softmax(-1)[..., :-1] @ v).transpose(1, 2)
        elif self.way == "exp over sum":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            e = (q @ k.mT).exp()
            y = ((e / e.sum(-1, keepdim=True)) @ v).transpose(1, 2)
        elif self.way == "channels":  # XCiT: a head's channels attend to each other
            q, k, v = (z.permute(0, 2, 3, 1) for z in (q, k, v))
            y = ((functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT).softmax(-1) @ v).permute(
                0, 3, 1, 2
            )
        else:
            raise ValueError(self.way)
        return self.o(y.reshape(sequences, tokens, 32))


class PreNorm(nn.Module):
    """A block around any attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention, self.mlp = attention, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sharp(model: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, matrices drawn large enough that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def tokens(sequences: int = 3, length: int = 9) -> Tensor:
    return torch.randint(0, 50, (sequences, length), generator=torch.Generator().manual_seed(0))


def states(sequences: int = 3, length: int = 9, width: int = 32) -> Tensor:
    return torch.randn(sequences, length, width, generator=torch.Generator().manual_seed(0))
