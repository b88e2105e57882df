"""Axes of maps and streams: heads before or after windows, ellipses, rows that see nothing, channels first."""

from __future__ import annotations

import pytest
import torch
from plain import sharp
from seen import record
from torch import nn
from torch.testing import assert_close

from fullrank.capture import KernelCall
from fullrank.capture.reading import Unreadable, read


def made(*shape: int) -> KernelCall:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    value = torch.randn(*shape[:-2], shape[-1], 8, generator=torch.Generator().manual_seed(1))
    return KernelCall("softmax", value, torch.float32, weights=logits.softmax(-1), logits=logits)


def test_heads_before_windows_and_after_are_told_apart_by_the_number_of_heads():
    call = made(2, 3, 5, 4, 6)  # three and five: heads, and windows
    before, after = read(call, 2, heads=3), read(call, 2, heads=5)
    assert before.attention.shape == (10, 3, 4, 6)
    assert after.attention.shape == (6, 5, 4, 6)
    assert call.weights is not None
    assert_close(before.attention.dense(), call.weights.transpose(1, 2).flatten(0, 1))
    assert_close(after.attention.dense(), call.weights.flatten(0, 1))


def test_as_many_windows_as_heads_are_not_guessed():
    with pytest.raises(Unreadable, match="two axes of 4 could both be the heads"):
        read(made(2, 4, 4, 5, 6), 2, heads=4)


@pytest.mark.parametrize("floor", [-1e9, -1e10, torch.finfo(torch.float32).min])
def test_a_row_whose_every_logit_is_a_mask_sees_nothing(floor):
    call = made(2, 3, 4, 6)
    logits = call.logits.clone()
    logits[1, :, 2] = floor
    logits[0, :, 1, 4:] = floor
    hidden = KernelCall("softmax", call.value, torch.float32, weights=logits.softmax(-1), logits=logits)
    visible = read(hidden, 2, heads=3).attention.visible_count().expand(2, 3, 4)
    assert visible[1, :, 2].tolist() == [0, 0, 0]
    assert visible[0, :, 1].tolist() == [4, 4, 4]
    assert visible[0, :, 0].tolist() == [6, 6, 6]


class Blocked(nn.Module):
    """Local attention by blocks of two tokens, einsum with an ellipsis; the stream holds its channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        sequences, width = x.shape[:2]
        y = x.flatten(2).mT.reshape(sequences, -1, 2, width)
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 8)).unbind(-3)
        p = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
        self.kernel = torch.einsum("...hqk,...khd->...qhd", p, v)
        y = self.out(self.kernel.flatten(-2)).reshape(sequences, -1, width)
        return x + y.mT.reshape(x.shape)


def test_an_einsum_with_an_ellipsis_over_blocks_of_a_stream_with_its_channels_first():
    model = sharp(nn.Sequential(Blocked(), Blocked()))
    x = torch.randn(3, 32, 4, 5, generator=torch.Generator().manual_seed(0))
    keep, recorder, _ = record(model, lambda: model(x))
    (stack,) = recorder.anatomy.stacks
    assert (stack.layout.axes, stack.heads, stack.width) == ("channels first", 4, 32)
    assert torch.equal(keep.states()[0], x.flatten(2).mT)
    assert [call.attention.shape for call in keep.calls] == [(30, 4, 2, 2)] * 2
    for block, call in zip(model, keep.calls, strict=True):
        recomputed = call.attention.matmat(call.value).transpose(1, 2)
        assert_close(recomputed, block.kernel.flatten(0, 1), atol=1e-5, rtol=1e-5)
