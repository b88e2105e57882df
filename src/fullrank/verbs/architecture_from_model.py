"""An architecture read off a model: its form by following one forward, its scales from its weights, its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fullrank.architecture import Architecture
from fullrank.capture import Stack, undisturbed
from fullrank.capture.replay import Replay
from fullrank.capture.survey import Forward
from fullrank.capture.weights import Weight, matrix
from fullrank.capture.wrappers import bare
from fullrank.errors import ArchitectureError, BatchError, ModelError
from fullrank.measure.attention_form import AttentionForm, attention_form
from fullrank.measure.block_form import BlockForm, MLPForm, block_form, mlp_form, rms_of_biases
from fullrank.measure.block_parts import Parts, Untold, parts_of_block
from fullrank.measure.positions_of_input import positions_of_input
from fullrank.spec import Inputs, Subject, inputs, subject_of
from fullrank.verbs.architecture_tokens import Tokens, look_at_tokens
from fullrank.verbs.batches import Call, as_calls
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.passes import require_finite_weights, watched

__all__ = ["architecture_from_model", "architecture_of"]

_FOLLOWED = 2  # sequences of the forward whose calls are followed
_FACTORS = ("attention_branch", "mlp_branch", "attention_skip", "mlp_skip")


def architecture_from_model(
    model: nn.Module | str | Subject,
    batch: Any = None,
    *,
    context: int | None = None,
    stack: str | None = None,
    seed: int = 0,
) -> Architecture:
    """The architecture of a model as it is.

    What blocks do is read off one forward of at most two sequences, whose calls are followed and partly run again with
    random numbers, so that no name of a module or a parameter is asked; standard deviations are the root mean squares
    of the weights' entries over all blocks; correlation and size of the tokens are those of the whole batch before the
    first block. Gains of norms are taken for one where they stand before weights or after sums; those of norms of
    branches (`peri`, `res-post`) and scales per channel count as branch multipliers, by their root mean square, as do
    factors between values and W_O. A window is seen where the batch is longer than it.

    Args:
        model: a module, a SPEC or what `spec.load` gave; it is left as it was.
        batch: what it is called with, as `examine` takes it, or what `spec.inputs` gave; by default one made for the
            model.
        context: tokens in a sequence; by default the batch's.
        stack: name of the stack, such as `decoder`; by default the first with attention.
        seed: of the default batch.

    Returns:
        The architecture.

    Raises:
        ArchitectureError: for what an architecture has no words for, or what cannot be told.
        FullrankError: for other bad input; see `examine`.
    """
    subject = _subject(model, seed)
    require_finite_weights(subject.model)
    given = inputs(subject, context=context, seed=seed) if batch is None else batch
    if isinstance(given, Inputs):
        calls = as_calls(subject.model, list(given.batches), known=given.real)
    else:
        calls = as_calls(subject.model, batch)
    return architecture_of(subject, calls, context=context, stack=stack)


def _subject(model: nn.Module | str | Subject, seed: int) -> Subject:
    found = loaded(model, seed=seed) if isinstance(model, str) else model
    wrapped = found.model if isinstance(found, Subject) else found
    if not isinstance(wrapped, nn.Module):
        raise BatchError(f"model={type(model).__name__} is neither a module nor a SPEC.")
    network = bare(wrapped, [])
    return replace(found, model=network) if isinstance(found, Subject) else subject_of(network)


def architecture_of(
    subject: Subject,
    calls: Sequence[Call],
    *,
    short: Call | None = None,
    context: int | None = None,
    stack: str | None = None,
    depth: Callable[[Stack], int] | None = None,
) -> Architecture:
    """The architecture of a model called so.

    Args:
        subject: the model.
        calls: what it is called with.
        short: the call whose forward is followed; by default two sequences of the first one.
        context: tokens in a sequence; by default those of the first call.
        stack: name of the stack.
        depth: blocks that a stack stands for, where the model holds only the first of them.

    Returns:
        The architecture.

    Raises:
        ArchitectureError: for what an architecture has no words for, or what cannot be told.
    """
    model = subject.model
    first = calls[0].part(0, _FOLLOWED) if calls[0].divisible else calls[0]
    with undisturbed(model):
        try:
            forward = watched(model, short or first)
        except ModelError as error:
            raise ArchitectureError(f"{subject.name} has no stack of attention blocks: {error}") from None
        index = _chosen(forward.anatomy.stacks, stack, subject.name)
        found = forward.anatomy.stacks[index]
        tokens = look_at_tokens(model, forward.anatomy, found, calls, first)
        try:
            fields = _fields(model, forward, index, tokens)
        except Untold as reason:
            raise ArchitectureError(f"{subject.name} is not described by an architecture: {reason}.") from None
    return Architecture(
        depth=len(found.paths) if depth is None else depth(found),
        context=context or tokens.count,
        stack=found.name,
        name=subject.name,
        **fields,
    )


def _chosen(stacks: Sequence[Stack], name: str | None, model: str) -> int:
    attending = [index for index, one in enumerate(stacks) if any(one.calls) and one.over == "tokens"]
    if name is not None:
        attending = [index for index in attending if stacks[index].name == name]
    if not attending:
        there = ", ".join(one.name for one in stacks) or "none"
        wanted = "" if name is None else f" called {name!r}"
        raise ArchitectureError(f"{model} has no stack of attention blocks{wanted}; its stacks are: {there}.")
    return attending[0]


# ---------------------------------------------------------------- fields


def _fields(model: nn.Module, forward: Forward, index: int, tokens: Tokens) -> dict[str, Any]:
    stack = forward.anatomy.stacks[index]
    if stack.layout.axes == "channels first":
        raise Untold("its stream is laid out with channels first")
    replay = Replay(model)
    parts = [parts_of_block(model, replay, forward, index, layer) for layer in range(len(stack.paths))]
    blocks = [block_form(one) for one in parts]
    attentions = [attention_form(one) for one in parts]
    mlps = [mlp_form(one) for one in parts if "down" in one.weights]
    if len(mlps) not in (0, len(parts)):
        raise Untold("only some of its blocks have an MLP")
    fields = _form(blocks, attentions, mlps) | _sizes(model, stack, parts)
    fields |= {f"std_{role}": _rms(model, [one.weights[role] for one in parts]) for role in parts[0].weights}
    squares = [rms_of_biases(one) for one in parts]
    for name, values in zip(("attention", "mlp", "up"), zip(*squares, strict=True), strict=True):
        fields[f"std_bias_{name}"] = _mean(values) ** 0.5
    fields["positions"] = _positions(replay, forward, index, attentions)
    fields |= {"mask": "causal" if stack.causal else "full", "width": stack.width, "dropout": _dropout(parts)}
    if 0 < tokens.reach < tokens.count:
        fields["window"] = tokens.reach
    return fields | tokens.fields()


def _form(blocks: Sequence[BlockForm], attentions: Sequence[AttentionForm], mlps: Sequence[MLPForm]) -> dict[str, Any]:
    """What all blocks have in common, and root mean squares of their factors."""
    fields: dict[str, Any] = {name: _same(name, blocks) for name in ("norm", "placement", "parallel")}
    fields |= {name: _same(name, attentions) for name in ("qk_norm",)}
    fields |= {name: _same(name, mlps) for name in ("activation", "gated")} if mlps else {}
    fields |= {name: _factor(getattr(one, name) for one in blocks) for name in _FACTORS}
    fields["attention_branch"] *= _factor(one.value_factor for one in attentions)
    fields["mlp_branch"] *= _factor(one.factor for one in mlps) if mlps else 1.0
    if fields["placement"] in ("peri", "res-post"):  # norms have undone these
        fields |= {name: _factor(getattr(one, name) for one in blocks) for name in _FACTORS}
    fields["logit_scale"] = _factor(one.logit_scale for one in attentions)
    caps = [one.softcap for one in attentions]
    if any((cap is None) != (caps[0] is None) for cap in caps):
        raise Untold("only some of its blocks bound their logits")
    fields["softcap"] = None if caps[0] is None else _factor(cap for cap in caps if cap is not None)
    return fields


_Form = TypeVar("_Form")


def _same(name: str, forms: Sequence[_Form]) -> Any:
    found = list(dict.fromkeys(getattr(one, name) for one in forms))
    if len(found) > 1:
        raise Untold(f"its blocks differ in {name.replace('_', ' ')} ({', '.join(map(str, found))})")
    return found[0]


def _factor(values: Any) -> float:
    """Root mean square with the sign of the mean; with three digits where only rounding is missing."""
    values = list(values)
    rms = math.copysign(math.sqrt(_mean([value**2 for value in values])), sum(values))
    near = float(f"{rms:.3g}")
    return near if math.isclose(rms, near, rel_tol=1e-6) else rms


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sizes(model: nn.Module, stack: Stack, parts: Sequence[Parts]) -> dict[str, Any]:
    shapes = {tuple(tuple(matrix(model, one.weights[role]).shape) for role in sorted(one.weights)) for one in parts}
    if len(shapes) > 1:
        raise Untold("the weights of its blocks differ in shape")
    shape = {role: tuple(matrix(model, weight).shape) for role, weight in parts[0].weights.items()}
    heads = stack.heads or 1
    if shape["q"][0] % heads:
        raise Untold(f"its {shape['q'][0]} query features are no multiple of its {heads} heads")
    head_width = shape["q"][0] // heads
    if shape["k"][0] % head_width or shape["v"][0] != shape["k"][0] or shape["o"][1] != shape["q"][0]:
        raise Untold("queries, keys and values of its heads differ in width")
    fields = {"heads": heads, "key_value_heads": shape["k"][0] // head_width, "head_width": head_width}
    return fields | {"mlp_width": shape["up"][0] if "up" in shape else 0}


def _rms(model: nn.Module, weights: Sequence[Weight]) -> float:
    """Root mean square of all entries."""
    squares = entries = 0.0
    for W in (matrix(model, weight) for weight in weights):
        for rows in W.split(64):  # short sums in float32, long ones in float64
            some = rows.flatten() if rows.dtype == torch.float64 else rows.flatten().float()
            squares += float(some @ some)
        entries += W.numel()
    return math.sqrt(squares / entries)


def _positions(replay: Replay, forward: Forward, index: int, attentions: Sequence[AttentionForm]) -> str:
    if any(one.rotary for one in attentions):
        return "rotary"
    biases = [one.bias for one in attentions if one.bias]
    return biases[0] if biases else positions_of_input(replay, forward, index)


def _dropout(parts: Sequence[Parts]) -> float:
    """The largest probability that a dropout in the blocks was called with."""
    found = [0.0]
    for one in parts:
        for node in one.region.calls:
            if node.name in ("dropout", "dropout_"):
                p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.0)
                found.append(float(p) if isinstance(p, float | int) else 0.0)
    return max(found)
