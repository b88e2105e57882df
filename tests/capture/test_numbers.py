"""Number by number: maps of a float64 eager copy, states of plain hooks, gradients of plain autograd."""

from __future__ import annotations

import contextlib
import copy
import functools
import math

import pytest
import torch
from families import observed
from seen import Case, Keep, tensors
from torch import Tensor, nn
from torch.testing import assert_close

import fullrank
from fullrank.capture import GradientState, ParameterGradient, Recorder, survey
from fullrank.verbs.batches import as_calls
from fullrank.verbs.gradients import forward_and_back
from oracles import maps
from oracles import states as oracle

PAIRS = ("bart", "mt5", "pegasus", "t5", "whisper")
ONE = (
    *("albert", "bert", "deberta", "electra", "esm", "mpnet", "roformer"),  # read both ways
    *("bloom", "cohere", "deepseek_v2", "gemma2", "gemma3", "gpt2", "gpt_neox"),
    *("gptj", "granite", "llama", "llama_padded", "longcat_flash", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen3", "smollm3"),
    *("deit", "dinov2", "vit", "videomae"),  # images, sound, video
)
CHECKED = (*ONE, *PAIRS)
SINGLE = ("deepseek_v2", "llama_padded", "mixtral")
"""Families whose eager code does not run in float64: grouped products of experts, masks of float32's largest number."""


@functools.cache
def report(family: str) -> fullrank.Report:
    case = observed(family).case
    return fullrank.examine(case.model, case.batch, spectrum=False)


@functools.cache
def eager(family: str) -> tuple[dict[tuple[str, int, str], Tensor], dict[str, list[Tensor]]]:
    """Maps by (stack, layer, part), and states by stack, of a float64 copy that makes its maps itself."""
    seen = observed(family)
    dtype = torch.float32 if family in SINGLE else torch.float64
    model = copy.deepcopy(seen.case.model).to(dtype).eval()
    with contextlib.suppress(ValueError, NotImplementedError):  # some make their maps themselves anyway
        model.set_attn_implementation("eager")
    batch = {name: x.to(dtype) if _is_floating(x) else x for name, x in seen.case.batch.items()}
    states: dict[str, list[Tensor]] = {stack: [] for stack in seen.case.blocks}
    with _states(model, seen.case, states), torch.no_grad():
        output = model(**batch, output_attentions=True)
    found = {}
    for stack in seen.recorder.anatomy.stacks:
        for layer, parts in enumerate(stack.calls, 1):
            for index, part in enumerate(parts):
                found[stack.name, layer, part] = _maps(output, stack.name, part, family)[
                    (layer - 1) * len(parts) + index if "cross" not in parts else layer - 1
                ]
    return found, states


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _maps(output, stack: str, part: str, family: str) -> tuple[Tensor, ...]:
    if family not in PAIRS:
        return output.attentions
    return output.cross_attentions if part == "cross" else getattr(output, f"{stack}_attentions")


@contextlib.contextmanager
def _states(model: nn.Module, case: Case, into: dict[str, list[Tensor]]):
    modules = dict(model.named_modules())

    def first(value):
        return value if isinstance(value, Tensor) else value[0]

    handles = []
    for stack, paths in case.blocks.items():
        # a shared block is called once per layer: only its first call brings the state before the first layer
        handles.append(
            modules[paths[0]].register_forward_pre_hook(
                lambda m, args, kwargs, kept=into[stack]: (
                    None if kept else kept.append(args[0] if args else kwargs["hidden_states"])
                ),
                with_kwargs=True,
            )
        )
        for path in dict.fromkeys(paths):
            leave = modules[path].register_forward_hook(lambda m, a, y, kept=into[stack]: kept.append(first(y)))
            handles.append(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real(family: str, stack: str, sequences: int, tokens: int) -> Tensor:
    """Which tokens of a stack are no padding: the batch's mask is of the stack that the batch's first input enters."""
    mask = observed(family).case.batch.get("attention_mask")
    if mask is None or (family in PAIRS and stack == "decoder"):
        return torch.ones(sequences, tokens, dtype=torch.bool)
    assert mask.shape == (sequences, tokens)
    return mask.bool()


def _value(family: str, **where) -> float:
    (row,) = report(family).rows.where(source="measured", scope="all", **where)
    return row.value


@pytest.mark.parametrize("family", CHECKED)
def test_entropy_and_sink_mass_of_every_head_are_those_of_the_eager_maps(family):
    found, _ = eager(family)
    assert found
    for (stack, layer, part), A in found.items():
        sequences, heads, queries, keys = A.shape
        of_keys = "encoder" if part == "cross" else stack
        real_queries, real_keys = (
            _real(family, stack, sequences, queries),
            _real(family, of_keys, sequences, keys),
        )
        for head in range(heads):
            each: dict[str, list[float]] = {"entropy": [], "normalized_entropy": [], "sink_mass": []}
            for b in range(sequences):
                visible = (A[b, head] > 0) & real_keys[b]
                seen = visible.sum(-1)
                fewest = min(32, math.ceil(int(seen[real_queries[b]].max()) / 4))
                rows = [t for t in range(queries) if real_queries[b, t] and seen[t] >= fewest]
                for metric, values in each.items():
                    values.append(getattr(maps, metric)(A[b, head].numpy(), visible.numpy(), rows))
            for metric, values in each.items():
                measured = _value(family, metric=metric, stack=stack, layer=layer, part=part, head=head)
                assert measured == pytest.approx(sum(values) / sequences, rel=1e-4, abs=1e-4), (metric, stack, layer)


@pytest.mark.parametrize("family", CHECKED)
def test_the_stream_has_the_numbers_that_plain_hooks_give(family):
    _, states = eager(family)
    for stack, of_stack in states.items():
        assert len(of_stack) == len(observed(family).case.blocks[stack]) + 1
        for layer, X in enumerate(of_stack):
            real = _real(family, stack, *X.shape[:2])
            for metric in ("rms", "similarity", "residual"):
                each = [getattr(oracle, metric)(x[kept].double()) for x, kept in zip(X, real, strict=True)]
                measured = _value(family, metric=metric, stack=stack, layer=layer, site="stream", part="out")
                assert measured == pytest.approx(sum(each) / len(each), rel=1e-4, abs=1e-4), (metric, stack, layer)


class WithLoss(nn.Module):
    """A model that returns a loss of its own: the mean square of all it returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        returned = [x for x in tensors(self.inner(**batch)) if x.is_floating_point() and x.requires_grad]
        squares = [x.square().mean() for x in returned]
        return {"loss": sum(squares, torch.zeros(()))}


@pytest.mark.parametrize("family", CHECKED)
def test_gradients_of_the_stream_and_of_parameters_are_those_of_plain_autograd(family):
    case = observed(family).case
    model = WithLoss(case.model)
    (call,) = as_calls(model, case.batch, None)
    anatomy = survey(model, lambda: call.run(model))
    keep = Keep(frozenset({"gradient"}))
    with Recorder(model, [keep], anatomy=anatomy, real=call.real) as recorder:
        about, _ = forward_and_back(model, call, recorder)
    assert about.of == "loss"
    assert all(parameter.grad is None for parameter in model.parameters())
    states: dict[str, list[Tensor]] = {stack: [] for stack in case.blocks}
    again = copy.deepcopy(model).requires_grad_(True)  # frozen parameters too
    with _states(again.inner, case, states), torch.enable_grad():
        loss = again(**case.batch)["loss"] * call.sequences
    parameters = dict(again.named_parameters())
    wanted = [*(X for of_stack in states.values() for X in of_stack), *parameters.values()]
    plain = torch.autograd.grad(loss, wanted, allow_unused=True)

    arrived = {
        (event.stack, event.layer): event.value
        for event in keep.events
        if isinstance(event, GradientState) and (event.which, event.part) == ("state", "out")
    }
    places = [(stack, layer) for stack, of_stack in states.items() for layer in range(len(of_stack))]
    assert set(arrived) == set(places)
    for place, expected in zip(places, plain, strict=False):
        assert _same(arrived[place], expected), place
    by_name = {event.name: event.value for event in keep.events if isinstance(event, ParameterGradient)}
    assert set(by_name) == set(parameters)
    for name, expected in zip(parameters, plain[len(places) :], strict=True):
        assert _same(by_name[name], expected), name


def _same(value: Tensor | None, expected: Tensor | None) -> bool:
    """What does not enter the loss has no gradient to autograd, and one of zeros to us."""
    if value is None or expected is None:
        return expected is None and (value is None or not value.any())
    assert_close(value, expected.reshape_as(value), atol=1e-5 * float(expected.abs().max()) + 1e-12, rtol=1e-5)
    return True


def test_at_least_twenty_families_are_checked():
    assert len(set(CHECKED)) == len(CHECKED) >= 20
