"""Heads stay heads in an edit, whichever of the leading axes of a kernel's tensors they are."""

from __future__ import annotations

import pytest
import torch
from plain import sharp
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from fullrank.capture import survey
from fullrank.edit import replace_heads, rewrite_attention
from fullrank.edit.layout import KernelLayout
from fullrank.errors import EditError

HEADS, WIDTH = 4, 32


class Attending(nn.Module):
    """Fused or by hand; `lay` brings (3, sequences, tokens, heads, width) into the form of the kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = HEADS, fused
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def lay(self, qkv: Tensor) -> Tensor:
        raise NotImplementedError

    def back(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    def forward(self, x):
        y = self.attend(*self.lay(self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).movedim(2, 0)))
        return x + self.out(self.back(y).reshape(x.shape))


class HeadsBeforeWindows(Attending):
    """(sequences, heads, windows, tokens, width), windows of five tokens."""

    def lay(self, qkv):
        return qkv.unflatten(2, (-1, 5)).movedim(4, 2)

    def back(self, y):
        return y.movedim(1, 3)


class WindowsBeforeHeads(Attending):
    """(sequences, windows, heads, tokens, width)."""

    def lay(self, qkv):
        return qkv.unflatten(2, (-1, 5)).movedim(4, 3)

    def back(self, y):
        return y.movedim(2, 3)


class HeadsFirst(Attending):
    """(heads, sequences, tokens, width)."""

    def lay(self, qkv):
        return qkv.movedim(3, 1)

    def back(self, y):
        return y.movedim(0, 2)


class HeadsFirstFolded(HeadsFirst):
    """The map is made with heads first and multiplied with heads and sequences in one axis."""

    def attend(self, q, k, v):
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return torch.bmm(p.view(-1, *p.shape[2:]), v.reshape(-1, *v.shape[2:])).view(v.shape)


KINDS = [HeadsBeforeWindows, WindowsBeforeHeads, HeadsFirst, HeadsFirstFolded]
CASES = [(kind, fused) for kind in KINDS for fused in (True, False) if not (fused and kind is HeadsFirstFolded)]


def built(kind, fused):
    model = sharp(nn.Sequential(kind(fused), kind(fused)))
    x = torch.randn(2, 15, WIDTH, generator=torch.Generator().manual_seed(0))
    return model, x, survey(model, lambda: model(x))


@pytest.mark.parametrize(("kind", "fused"), CASES)
def test_the_heads_that_are_replaced_are_those_that_the_output_projection_reads(kind, fused):
    model, x, anatomy = built(kind, fused)
    with torch.no_grad():
        base = model(x)
        with replace_heads(model, anatomy, 0.0, heads=[1, 3], layer=1):
            edited = model(x)
        assert torch.equal(model(x), base)
        model[0].out.weight[:, 8:16] = 0
        model[0].out.weight[:, 24:] = 0
        assert_close(edited, model(x))
        assert not torch.allclose(edited, base, atol=1e-2)


@pytest.mark.parametrize(("kind", "fused"), CASES)
def test_a_call_has_its_heads_second_and_what_is_put_in_by_head_gets_there(kind, fused):
    model, x, anatomy = built(kind, fused)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    seen = []

    def scaled(call):
        seen.append((call.value.shape[:2], call.query is None or call.query.shape[1] == HEADS))
        return call.change(value=call.value * scale[:, None, None])

    def uniform(call):
        return call.change(weights=torch.full((1, 1, call.queries, call.keys), 1 / call.keys))

    with torch.no_grad():
        with rewrite_attention(model, anatomy, before=scaled, layer=2):
            edited = model(x)
        with rewrite_attention(model, anatomy, before=uniform, layer=2):
            averaged = model(x)
        state, columns = model[0](x), scale.repeat_interleave(8)
        model[1].qkv.weight[2 * WIDTH :] *= columns[:, None]
        model[1].qkv.bias[2 * WIDTH :] *= columns
        assert_close(edited, model(x))
        model[1].qkv.weight[2 * WIDTH :] /= columns[:, None]
        model[1].qkv.bias[2 * WIDTH :] /= columns
        model[1].qkv.weight[: 2 * WIDTH] = 0  # then every map is uniform
        model[1].qkv.bias[: 2 * WIDTH] = 0
        assert_close(averaged, model[1](state))
    windows = 3 if kind in KINDS[:2] else 1
    assert seen == [((2 * windows, HEADS), True)]


SHAPES = {  # rows, and masks that broadcast to them
    (2, 4, 5, 8): [(5, 5), (2, 1, 5, 5), (4, 5, 5)],
    (4, 2, 5, 8): [(5, 5), (4, 1, 5, 5), (1, 2, 5, 5), (2, 5, 5)],
    (8, 5, 8): [(5, 5), (1, 5, 5), (8, 5, 5)],
    (5, 8): [(5, 5)],
    (2, 3, 4, 5, 8): [(5, 5), (3, 1, 5, 5), (2, 3, 1, 5, 5), (4, 5, 5)],
    (2, 4, 3, 5, 8): [(5, 5), (4, 3, 5, 5), (1, 3, 5, 5), (2, 1, 3, 5, 5)],
}


@pytest.mark.parametrize(("rows", "mask"), [(rows, mask) for rows, masks in SHAPES.items() for mask in masks])
def test_a_mask_says_of_every_map_what_it_said_before(rows, mask):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(rows, generator=generator)
    layout = KernelLayout.of(tensor, 1 if len(rows) == 2 else 2, 1 if len(rows) == 2 else HEADS, "h.0")
    seen = torch.rand(mask, generator=generator) > 0.4
    of_each = seen.expand(*rows[:-2], 5, 5)
    folded = layout.fold_mask(seen)
    assert folded.ndim == 4
    assert torch.equal(folded.expand(layout.batch, layout.heads, 5, 5), layout.fold(of_each))
    assert torch.equal(layout.unfold_mask(folded).expand(of_each.shape), of_each)


@pytest.mark.parametrize("rows", SHAPES)
def test_a_tensor_comes_back_as_it_was(rows):
    tensor = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    layout = KernelLayout.of(tensor, 1 if len(rows) == 2 else 2, 1 if len(rows) == 2 else HEADS, "h.0")
    folded = layout.fold(tensor)
    assert folded.shape[:2] == (layout.batch, layout.heads)
    assert torch.equal(layout.unfold(folded, tensor, "query"), tensor)
    flat = tensor.reshape(-1, *tensor.shape[-2:])
    if layout.exchange is not None:
        assert torch.equal(layout.fold(flat), folded)
        assert torch.equal(layout.unfold(folded, flat, "query"), flat)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ((2, 4, 4, 5, 8), "attention in h.0 cannot be edited: two axes of 4 could both be the heads"),
        ((2, 4, 3, 3, 5, 8), r"h.0 cannot be edited: the last of its leading axes \(2, 4, 3, 3\) is not that of its 4"),
        ((2, 2, 2, 5, 8), "is not that of its 4 heads"),
        ((7, 5, 8), "7 maps for 2 sequences: sequences and heads cannot be told apart"),
    ],
)
def test_heads_that_are_not_known_are_not_edited(rows, sentence):
    with pytest.raises(EditError, match=sentence):
        KernelLayout.of(torch.zeros(rows), 2, HEADS, "h.0")
