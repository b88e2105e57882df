"""Edits of streams that are not (sequences, tokens, width), or not the first tensor that a block is given."""

from __future__ import annotations

import pytest
import torch
from plain import sharp
from torch import Tensor, nn
from torch.testing import assert_close

from fullrank.capture import survey
from fullrank.edit import replace_stream, rewrite_attention, rewrite_block, skip_block
from fullrank.errors import EditError


class Attending(nn.Module):
    """Attention over all places of a stream that is laid out in some way of its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def tokens(self, x: Tensor) -> Tensor:
        return x

    def back(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def forward(self, x):
        y = self.tokens(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT * 0.2).softmax(-1)
        return x + self.back(self.out((p @ v).transpose(1, 2).flatten(2)), x)


class ChannelsFirst(Attending):
    def tokens(self, x):
        return x.flatten(2).mT

    def back(self, y, x):
        return y.mT.reshape(x.shape)


class ChannelsLast(Attending):
    def tokens(self, x):
        return x.flatten(1, 2)

    def back(self, y, x):
        return y.reshape(x.shape)


class Second(Attending):
    """The stream is the second tensor, after something narrower."""

    def forward(self, other, x):
        return super().forward(x) + 0.1 * other.repeat(1, 1, 2)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Second() for _ in range(3))

    def forward(self, x):
        other = x.flip(0)[..., :16]
        for block in self.blocks:
            x = block(other, x)
        return x


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def images(number: int = 3) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(number)))
    return sharp(model), draw(5, 8, 4, 4)


GRIDS = {
    "channels first": (ChannelsFirst, (3, 32, 4, 5), (2, 3)),
    "channels last": (ChannelsLast, (3, 4, 5, 32), (1, 2)),
}


@pytest.mark.parametrize("layout", GRIDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_tokens_of_a_grid_are_replaced_by_their_mean(layout, layer):
    kind, shape, places = GRIDS[layout]
    model, x = sharp(nn.Sequential(*(kind() for _ in range(3)))), draw(*shape)
    anatomy = survey(model, lambda: model(x))
    seen = []

    def mean(X):
        seen.append(X.shape)
        return X.mean(1, keepdim=True)

    with torch.no_grad():
        with replace_stream(model, anatomy, mean, layer=layer):
            edited = model(x)
        state = x
        for block in model[:layer]:
            state = block(state)
        state = state.mean(places, keepdim=True).expand(state.shape)
        for block in model[layer:]:
            state = block(state)
    assert seen == [(3, 20, 32)]
    assert_close(edited, state)


@pytest.mark.parametrize("layout", GRIDS)
def test_a_block_of_a_grid_is_rewritten_over_its_tokens(layout):
    kind, shape, places = GRIDS[layout]
    model, x = sharp(nn.Sequential(*(kind() for _ in range(3)))), draw(*shape)
    anatomy = survey(model, lambda: model(x))
    with torch.no_grad():
        with rewrite_block(model, anatomy, lambda X, Y: Y - Y.mean(1, keepdim=True), layer=3):
            edited = model(x)
        plain = model(x)
    assert_close(edited, plain - plain.mean(places, keepdim=True))


@pytest.mark.parametrize("layout", GRIDS)
def test_attention_over_a_grid_is_rewritten(layout):
    kind, shape, _ = GRIDS[layout]
    model, x = sharp(nn.Sequential(*(kind() for _ in range(2)))), draw(*shape)
    anatomy = survey(model, lambda: model(x))
    seen = []

    def silent(call, output):
        seen.append(output.shape)
        return torch.zeros_like(output)

    with torch.no_grad(), rewrite_attention(model, anatomy, after=silent, layer=2):
        edited = model(x)
        without = model[0](x)
        bias = model[1].out.bias
    assert seen == [(3, 4, 20, 8)]
    assert_close(edited, without + (bias[:, None, None] if layout == "channels first" else bias))


def test_a_stream_that_is_not_the_first_tensor_is_the_one_that_is_edited():
    model, x = sharp(Chain()), draw(2, 6, 32)
    anatomy = survey(model, lambda: model(x))
    assert anatomy.stacks[0].at == 1
    with torch.no_grad():
        other = x.flip(0)[..., :16]
        first = model.blocks[0](other, x)
        with skip_block(model, anatomy, layer=2):
            skipped = model(x)
        assert_close(skipped, model.blocks[2](other, first))
        with replace_stream(model, anatomy, 0.0, layer=0):
            replaced = model(x)
        state = torch.zeros_like(x)
        for block in model.blocks:
            state = block(other, state)
        assert_close(replaced, state)
        with rewrite_block(model, anatomy, lambda X, Y: X, layer=2):
            assert_close(model(x), skipped)


def test_samples_are_the_tokens_of_one_sequence():
    model, x = images()
    anatomy = survey(model, lambda: model(x))
    assert anatomy.stacks[0].over == "samples"
    with torch.no_grad():
        with replace_stream(model, anatomy, lambda X: X.mean(1, keepdim=True), layer=1):
            edited = model(x)
        state = model[0](x).mean(0, keepdim=True).expand(5, -1, -1, -1)
        assert_close(edited, model[2](model[1](state)))


def test_a_layer_of_weights_ends_where_the_next_begins():
    layers = [nn.Linear(6, 16), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    model, x = sharp(nn.Sequential(*layers)), draw(7, 6)
    anatomy = survey(model, lambda: model(x))
    (stack,) = anatomy.stacks
    assert stack.end is not None
    with torch.no_grad():
        with replace_stream(model, anatomy, lambda X: X.mean(1, keepdim=True), layer=2):
            edited = model(x)
        state = model[:4](x).mean(0, keepdim=True).expand(7, -1)  # after the second layer's activation
        assert_close(edited, model[4:](state))
    last = len(stack.paths)
    for edit in (
        lambda: replace_stream(model, anatomy, 0.0, layer=last),
        lambda: skip_block(model, anatomy, layer=2),
        lambda: rewrite_block(model, anatomy, lambda X, Y: Y, layer=2),
    ):
        with pytest.raises(EditError, match="layers of weights with what follows each"):
            edit()


def test_a_stream_whose_tokens_are_not_known_is_refused_and_the_model_still_runs():
    class Ambiguous(ChannelsLast):
        pass

    model = sharp(nn.Sequential(Ambiguous(), Ambiguous()))
    x = draw(2, 32, 32, 32)  # as many channels as columns
    anatomy = survey(model, lambda: model(x))
    with torch.no_grad():
        before = model(x)
        with replace_stream(model, anatomy, lambda X: X, layer=1), pytest.raises(EditError, match="which axis holds"):
            model(x)
        assert torch.equal(model(x), before)
