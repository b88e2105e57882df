"""Vision models in plain torch: flat, by stages, with mixed heads, over classes and over channels."""

from __future__ import annotations

import pytest
import torch
from plain import sharp, states
from seen import assert_identical, record
from timm_like import Attention, Block, CaiT, Hierarchy, ParallelBlock, SharedBlocks, ViT, Windows, XCiT
from torch.testing import assert_close


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def looked_at(model, x):
    model = sharp(model)

    def run():
        with torch.no_grad():
            return model(x)

    before = run()
    keep, recorder, during = record(model, run)
    assert_identical(before, during)
    return keep, recorder, model


def assert_kernels(keep, model):
    """Map times values is what enters the projection after it."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.proj.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if hasattr(module, "proj")
    ]
    yield
    for handle in handles:
        handle.remove()
    for call in keep.calls:
        out = seen[call.path].pop(0)
        recomputed = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        assert_close(recomputed, out, atol=1e-5, rtol=1e-5)
    yield


def compare(keep, model, x):
    check = assert_kernels(keep, model)
    next(check)
    with torch.no_grad():
        model(x)
    next(check)


@pytest.mark.parametrize("fused", [True, False])
def test_vit(fused):
    keep, recorder, model = looked_at(ViT(*(Block(Attention(fused=fused)) for _ in range(3))), images())
    (stack,) = recorder.anatomy.stacks
    assert (stack.name, stack.paths, stack.heads) == ("vision", ("blocks.0", "blocks.1", "blocks.2"), 4)
    assert [state.shape for state in keep.states().values()] == [(2, 17, 32)] * 4
    assert set(keep.states("stream", "mid")) == set(keep.states("read", "mid")) == {1, 2, 3}
    compare(keep, model, images())


def test_two_attentions_beside_each_other_then_two_mlps():
    keep, recorder, model = looked_at(ViT(ParallelBlock(), ParallelBlock()), images())
    (stack,) = recorder.anatomy.stacks
    assert stack.paths == ("blocks.0", "blocks.1")
    assert stack.calls == (("self", "self.1"),) * 2
    assert [call.path for call in keep.calls] == [f"blocks.{b}.attns.{a}" for b in range(2) for a in range(2)]
    compare(keep, model, images())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grids", [True, False])
def test_windows_and_grids_by_stages(grids, fused):
    keep, recorder, model = looked_at(Hierarchy(fused=fused, grids=grids), images())
    (stack,) = recorder.anatomy.stacks
    paths = tuple(f"stages.{stage}.blocks.{block}" for stage in range(2) for block in range(2))
    assert (stack.name, stack.paths, stack.heads, stack.layout.axes) == ("vision", paths, 2, "channels last")
    assert [tuple(state.shape) for state in keep.states().values()] == [(2, 64, 16)] * 3 + [(2, 16, 32)] * 2
    assert [call.attention.shape for call in keep.calls] == [(32, 2, 4, 4)] * 2 + [(8, 4, 4, 4)] * 2
    assert set(keep.states("stream", "mid")) == {1, 2, 3, 4}
    compare(keep, model, images())


def test_a_grid_takes_places_apart_and_a_window_places_beside_each_other():
    places = torch.arange(16.0).view(1, 4, 4, 1).expand(-1, -1, -1, 4).clone()
    rows = {}
    for grid in (False, True):
        module = Windows(4, 1, size=2, grid=grid, fused=True)
        module.attn.register_forward_pre_hook(lambda m, args, grid=grid: rows.__setitem__(grid, args[0][0, :, 0]))
        module(places)
    assert rows[False].tolist() == [0, 1, 4, 5]
    assert rows[True].tolist() == [0, 2, 8, 10]


def test_talking_heads_are_said_and_class_attention_is_seen():
    keep, recorder, model = looked_at(CaiT(), images())
    stacks = {stack.paths[0].split(".")[0]: stack for stack in recorder.anatomy.stacks}
    assert set(stacks) == {"blocks", "blocks_token_only"}
    mixed, of_class = stacks["blocks"], stacks["blocks_token_only"]
    assert mixed.calls == ((), ())
    assert of_class.calls == (("cross",),) * 2 or of_class.calls == (("self",),) * 2
    told = f"a softmax in the blocks of {mixed.name} is not multiplied with values as a plain product: not reported."
    assert told in recorder.notes
    assert {call.stack for call in keep.calls} == {of_class.name}
    assert [call.attention.shape for call in keep.calls] == [(2, 4, 1, 17)] * 2
    compare(keep, model, images())


def test_channel_attention_is_said_and_class_attention_is_seen():
    keep, recorder, model = looked_at(XCiT(), images())
    stacks = {stack.paths[0].split(".")[0]: stack for stack in recorder.anatomy.stacks}
    assert set(stacks) == {"blocks", "blocks_token_only"}
    assert any("blocks.0.attn is not attention over tokens (channels, experts or heads)" in n for n in recorder.notes)
    assert {call.path.split(".")[0] for call in keep.calls} == {"blocks_token_only"}
    compare(keep, model, images())


def test_blocks_that_are_called_twice_are_four_layers():
    keep, recorder, model = looked_at(SharedBlocks(), states())
    (stack,) = recorder.anatomy.stacks
    assert stack.paths == ("blocks.0", "blocks.1") * 2
    assert list(keep.states()) == [0, 1, 2, 3, 4]
    assert [call.layer for call in keep.calls] == [1, 2, 3, 4]
    compare(keep, model, states())
