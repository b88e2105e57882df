"""Every family: seen without being changed, every layer, every head, the numbers its own kernels used."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, REFUSED, Observed, build, observed
from seen import assert_identical, plain_hooks, record
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from fullrank.capture import Stack
from fullrank.errors import ModelError


@pytest.fixture(params=sorted(set(FAMILIES) - set(REFUSED)))
def seen(request) -> Observed:
    return observed(request.param)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_model_without_blocks_to_be_found_is_answered_with_one_sentence(family):
    case = build(family)
    with pytest.raises(ModelError) as error:
        record(case.model, case.run)
    assert REFUSED[family] in str(error.value)
    assert "\n" not in str(error.value)


def test_outputs_under_the_recorder_are_the_same_bit_for_bit(seen):
    assert_identical(seen.before, seen.during)
    assert_identical(seen.before, seen.after)


def test_nothing_is_left_on_the_model(seen):
    assert seen.changed == []


def test_stacks_layers_heads_and_parts_are_found(seen):
    case, anatomy = seen.case, seen.recorder.anatomy
    assert {stack.name: list(stack.paths) for stack in anatomy.stacks} == case.blocks
    assert {stack.name: stack.heads for stack in anatomy.stacks if stack.heads} == case.heads
    assert {stack.name for stack in anatomy.stacks if stack.causal} == case.causal
    found = [(call.stack, call.layer, call.part) for call in seen.keep.calls]
    expected = [
        (stack.name, layer, part)
        for stack in anatomy.stacks
        for layer, parts in enumerate(stack.calls, 1)
        for part in parts
    ]
    assert found == expected
    assert {call.kernel for call in seen.keep.calls} == ({case.kernel} if case.kernel else set())
    assert {(call.stack, call.part) for call in seen.keep.calls} >= set(case.projections)


def test_the_map_times_the_values_is_what_the_kernel_returned(seen):
    case = seen.case
    modules = dict(case.model.named_modules())
    names = [
        f"{path}.{inside}"
        for (stack, _), inside in case.projections.items()
        for path in case.blocks[stack]
        if f"{path}.{inside}" in modules
    ]
    with plain_hooks(case.model, names, inputs=True) as inputs, _Products() as products:
        case.run()
    outputs: dict[str, list[Tensor]] = {}
    for name, value in inputs:
        outputs.setdefault(name, []).append(value)
    for call in seen.keep.calls:
        assert call.value is not None
        recomputed = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        if (call.stack, call.part) in case.projections:
            name = f"{case.blocks[call.stack][call.layer - 1]}.{case.projections[call.stack, call.part]}"
            kernel = outputs[name].pop(0)
            assert_close(recomputed, kernel.reshape_as(recomputed), atol=1e-5, rtol=1e-5)
        else:  # heads are combined before they leave: then some product of the forward has these numbers
            assert any(_same_numbers(recomputed, product) for product in products.seen)
        if min(call.attention.shape[-2:]) > 1:  # not just any average of the values
            assert (call.attention - call.attention.uniform()).dense().abs().max() > 1e-2


class _Products(TorchFunctionMode):
    """Results of all products and fused kernels of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.multi_head_attention_forward:  # the products are inside
            with pytest.MonkeyPatch.context() as patch, self:
                patch.setattr(functional, "has_torch_function", lambda tensors: False)
                return func(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in {"scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "einsum"}:
            self.seen.append(output.detach().clone())
        return output


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel():
        return False
    return torch.allclose(one.flatten().sort()[0], other.flatten().sort()[0], atol=1e-5, rtol=1e-5)


def test_the_stream_is_what_plain_hooks_see_and_its_end_is_not_the_final_norm(seen):
    case = seen.case
    for stack in seen.recorder.anatomy.stacks:
        paths = case.blocks[stack.name]
        with plain_hooks(case.model, paths) as outputs, plain_hooks(case.model, paths[:1], inputs=True) as inputs:
            case.run()
        states = seen.keep.states(stack=stack.name)
        if not states:
            assert any(f"the stream of {stack.name} has the shape" in note for note in case.says)
            continue
        assert list(states) == list(range(len(paths) + 1))
        assert torch.equal(states[0], _laid_out(inputs[0][1], stack))
        for layer, (_, value) in enumerate(outputs, 1):
            assert torch.equal(states[layer], _laid_out(value, stack))


def _laid_out(x: Tensor, stack: Stack) -> Tensor:
    if stack.over == "samples":
        return x.flatten(1)[None]
    if stack.layout.axes == "channels first":
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.transpose(0, 1) if stack.layout.tokens_first else x[None] if x.ndim == 2 else x


def test_states_between_attention_and_mlp_and_what_norms_hand_on(seen):
    case, keep = seen.case, seen.keep
    without = False
    for stack in seen.recorder.anatomy.stacks:
        attending = [n for n, parts in enumerate(stack.calls, 1) if parts]
        mid = case.expected(stack.name, "with_mid")
        mid = mid if isinstance(mid, list) else attending if mid else []
        without |= bool(attending) and not mid
        with_read = case.expected(stack.name, "with_read")
        assert list(keep.states("stream", "mid", stack.name)) == mid
        read_mid = list(keep.states("read", "mid", stack.name))
        assert read_mid == (mid if with_read and case.with_read_mid else [])
        read_out = set(keep.states("read", "out", stack.name))
        assert read_out <= set(range(len(stack.paths)))
        assert bool(read_out) == with_read
    assert any("no state between attention and MLP" in note for note in seen.recorder.notes) == without


def test_what_could_not_be_seen_is_said(seen):
    for sentence in seen.case.says:
        assert any(sentence in note for note in seen.recorder.notes)
    if not seen.keep.calls:
        assert seen.case.says
