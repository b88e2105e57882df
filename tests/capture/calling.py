"""Blocks around an attention function, and what all its callers check."""

from __future__ import annotations

import torch
from plain import sharp, states
from seen import assert_identical, record
from torch import nn
from torch.testing import assert_close

TOKENS, HEADS, GROUPS, WIDTH = 6, 4, 2, 8
LENGTHS = [4, 1, 6]


class Calling(nn.Module):
    """A block around a function of (queries, keys, values), each (sequences, tokens, heads, width)."""

    def __init__(self, attention, *, heads=HEADS, groups=HEADS) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), attention
        self.q, self.kv = nn.Linear(32, heads * WIDTH), nn.Linear(32, 2 * groups * WIDTH)
        self.o, self.mlp = nn.Linear(heads * WIDTH, 32), nn.Linear(32, 32)
        self.heads, self.groups = heads, groups
        self.outputs: list[torch.Tensor] = []

    def forward(self, x):
        y = self.norm(x)
        q = self.q(y).view(*x.shape[:-1], self.heads, WIDTH)
        k, v = self.kv(y).view(*x.shape[:-1], 2, self.groups, WIDTH).unbind(-3)
        out = self.attention(q, k, v)
        self.outputs.append(out.detach())
        x = x + self.o(out.flatten(-2))
        return x + self.mlp(x)


def looked_at(attention, x=None, **options):
    """One model of two such blocks: what was kept, and the kernel's outputs in the recorded forward."""
    model = sharp(nn.Sequential(Calling(attention, **options), Calling(attention, **options)))
    x = states(3, TOKENS) if x is None else x

    def run():
        for block in model:
            block.outputs.clear()
        with torch.no_grad():
            return model(x)

    before = run()
    keep, recorder, during = record(model, run)
    assert_identical(before, during)
    return keep, recorder, [output for block in model for output in block.outputs]


def assert_read(keep, outputs):
    assert [(call.layer, call.part) for call in keep.calls] == [(1, "self"), (2, "self")]
    for call, output in zip(keep.calls, outputs, strict=True):
        assert_close(call.attention.matmat(call.value).transpose(1, 2), output, atol=1e-5, rtol=1e-5)
        assert_close(call.attention.matmat(call.value), call.attention.dense() @ _per_head(call), atol=1e-5, rtol=1e-5)


def _per_head(call):
    return call.value.repeat_interleave(call.attention.shape[1] // call.value.shape[1], 1)
