"""Vision blocks of the shapes in use, written anew: windows and grids, talking heads, class attention, channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """Queries, keys and values from one matrix, through the fused function or by hand."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, *, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.fused, self.scale = heads, fused, (width // heads) ** -0.5

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        sequences, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(sequences, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            s = (q * self.scale) @ k.transpose(-2, -1)
            y = (s if bias is None else s + bias).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(sequences, tokens, width))


class Block(nn.Module):
    """Branches scaled by learned factors."""

    def __init__(self, attention: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ParallelBlock(nn.Module):
    """Two attentions beside each other, then two MLPs beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.attns = nn.ModuleList(Attention() for _ in range(2))
        self.ffns = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.stack([a(n(x)) for a, n in zip(self.attns, self.norms[:2], strict=True)]).sum(0)
        return x + torch.stack([f(n(x)) for f, n in zip(self.ffns, self.norms[2:], strict=True)]).sum(0)


class ViT(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


class Windows(nn.Module):
    """Attention inside windows (size × size places) or over a grid of places that lie apart, as in MaxViT and Swin."""

    def __init__(self, width: int, heads: int, *, size: int, grid: bool, fused: bool) -> None:
        super().__init__()
        self.attn, self.size, self.grid = Attention(width, heads, fused=fused), size, grid
        self.bias = nn.Parameter(torch.randn(heads, size**2, size**2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        sequences, rows, columns, width = x.shape
        n, s = (rows // self.size, columns // self.size), self.size
        # axes: 0 sequences, then rows and columns, each as (window, place in it) or (place in it, window)
        shape = (s, n[0], s, n[1]) if self.grid else (n[0], s, n[1], s)
        order = (0, 2, 4, 1, 3, 5) if self.grid else (0, 1, 3, 2, 4, 5)
        y = x.view(sequences, *shape, width).permute(order).reshape(-1, s * s, width)
        y = self.attn(y, self.bias[None].expand(y.shape[0], -1, -1, -1))
        folded = [sequences, *(shape[axis - 1] for axis in order[1:5]), width]
        back = [order.index(axis) for axis in range(6)]
        return y.view(folded).permute(back).reshape(sequences, rows, columns, width)


class Stage(nn.Module):
    """Windows and grids in turn, (sequences, rows, columns, width); then half as many places, twice as wide."""

    def __init__(self, width: int, heads: int, *, last: bool, fused: bool, grids: bool) -> None:
        super().__init__()
        kinds = (False, True) if grids else (False, False)
        attentions = [Windows(width, heads, size=2, grid=grid, fused=fused) for grid in kinds]
        self.blocks = nn.Sequential(*(Block(attention, width) for attention in attentions))
        self.downsample = nn.Identity() if last else nn.Linear(4 * width, 2 * width)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.last:
            return x
        sequences, rows, columns, width = x.shape
        x = x.view(sequences, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return self.downsample(x.reshape(sequences, rows // 2, columns // 2, 4 * width))


class Hierarchy(nn.Module):
    """Swin with windows alone, MaxViT with grids between them."""

    def __init__(self, *, fused: bool, grids: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.stages = nn.Sequential(
            Stage(16, 2, last=False, fused=fused, grids=grids), Stage(32, 4, last=True, fused=fused, grids=grids)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax: the map that meets the values is no softmax any more."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(sequences, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        s = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        p = self.after(s.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((p @ v).transpose(1, 2).reshape(sequences, tokens, width))


class ClassAttention(nn.Module):
    """One query, the class token, over itself and all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x[:, :1]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """The stream is the class token alone; the patches stand beside it and do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), ClassAttention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        token = token + self.attn(self.norm1(torch.cat([token, x], 1)))
        return token + self.mlp(self.norm2(token))


class CaiT(nn.Module):
    """Blocks with talking heads over the patches, then blocks of class attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Block(TalkingHeads()), Block(TalkingHeads()))
        self.blocks_token_only = nn.ModuleList(ClassBlock() for _ in range(2))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2))
        token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            token = block(x, token)
        return token


class ChannelAttention(nn.Module):
    """The channels of a head attend to each other (XCiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(sequences, tokens, 3, HEADS, -1).permute(2, 0, 3, 4, 1).unbind(0)
        s = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * self.temperature
        return self.proj((s.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(sequences, tokens, width))


class XCiT(CaiT):
    """Channel attention over the patches, then blocks of class attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(ChannelAttention()), Block(ChannelAttention()))


class SharedBlocks(nn.Module):
    """Two blocks, each called twice, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(Attention()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return x
