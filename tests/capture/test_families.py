"""Every family: seen without being changed, every layer, every head, the numbers its own kernels used."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from seen import assert_identical, plain_hooks, record
from torch.testing import assert_close


@pytest.fixture(params=sorted(FAMILIES))
def case(request):
    return build(request.param)


def test_outputs_under_the_recorder_are_the_same_bit_for_bit(case):
    before = case.run()
    _, _, during = record(case.model, case.run)
    assert_identical(before, during)
    assert_identical(before, case.run())


def test_stacks_layers_heads_and_parts_are_found(case):
    keep, recorder, _ = record(case.model, case.run)
    anatomy = recorder.anatomy
    assert {stack.name: list(stack.paths) for stack in anatomy.stacks} == case.blocks
    assert {stack.name: stack.heads for stack in anatomy.stacks} == case.heads
    assert {stack.name for stack in anatomy.stacks if stack.causal} == case.causal
    found = [(call.stack, call.layer, call.part) for call in keep.calls]
    expected = [
        (stack.name, layer, part)
        for stack in anatomy.stacks
        for layer, parts in enumerate(stack.calls, 1)
        for part in parts
    ]
    assert found == expected
    assert {kernel for call in keep.calls if (kernel := call.kernel)} == {case.kernel}
    assert {(call.stack, call.part) for call in keep.calls} >= set(case.projections)


def test_the_map_times_the_values_is_what_the_kernel_returned(case):
    modules = dict(case.model.named_modules())
    keep, _, _ = record(case.model, case.run)
    names = [
        f"{path}.{inside}"
        for (stack, _), inside in case.projections.items()
        for path in case.blocks[stack]
        if f"{path}.{inside}" in modules
    ]
    with plain_hooks(case.model, names, inputs=True) as seen:
        case.run()
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, value in seen:
        outputs.setdefault(name, []).append(value)
    compared = 0
    for call in keep.calls:
        if (call.stack, call.part) not in case.projections:
            continue
        name = f"{case.blocks[call.stack][call.layer - 1]}.{case.projections[call.stack, call.part]}"
        kernel = outputs[name].pop(0)
        recomputed = call.attention.matmat(call.value).transpose(1, 2).flatten(2)
        assert_close(recomputed, kernel.reshape_as(recomputed), atol=1e-5, rtol=1e-5)
        assert (
            call.attention - call.attention.uniform()
        ).dense().abs().max() > 1e-2  # not just any average of the values
        compared += 1
    assert compared == (len(keep.calls) if case.projections else 0)


def test_the_stream_is_what_plain_hooks_see_and_its_end_is_not_the_final_norm(case):
    keep, _, _ = record(case.model, case.run)
    for stack, paths in case.blocks.items():
        with plain_hooks(case.model, paths) as outputs, plain_hooks(case.model, paths[:1], inputs=True) as inputs:
            case.run()
        states = keep.states(stack=stack)
        assert list(states) == list(range(len(paths) + 1))
        turned = (lambda x: x.transpose(0, 1)) if type(case.model).__name__.startswith("XLNet") else (lambda x: x)
        assert torch.equal(states[0], turned(inputs[0][1]))
        for layer, (_, value) in enumerate(outputs, 1):
            assert torch.equal(states[layer], turned(value))


def test_states_between_attention_and_mlp_and_what_norms_hand_on(case):
    keep, recorder, _ = record(case.model, case.run)
    for stack, paths in case.blocks.items():
        attending = [n for n, parts in enumerate(_stack(recorder, stack).calls, 1) if parts]
        assert list(keep.states("stream", "mid", stack)) == (attending if case.with_mid else [])
        read_mid = list(keep.states("read", "mid", stack))
        assert read_mid == (attending if case.with_mid and case.with_read else [])
        read_out = set(keep.states("read", "out", stack))
        assert read_out <= set(range(len(paths)))
        assert bool(read_out) == case.with_read
    assert any("no state between attention and MLP" in note for note in recorder.notes) != case.with_mid


def _stack(recorder, name):
    return next(stack for stack in recorder.anatomy.stacks if stack.name == name)
