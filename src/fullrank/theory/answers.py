"""What a user takes away from theory: depths, contexts and scales, each with its uncertainty and its source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.theory.answer import Answer
from fullrank.theory.giorlandino_goldt_course import final, late, layers
from fullrank.theory.giorlandino_goldt_map import BlockMap
from fullrank.theory.giorlandino_goldt_parameters import parameters_of
from fullrank.theory.giorlandino_goldt_trainability import phases
from fullrank.theory.random_energy import TRANSITION
from fullrank.theory.theory import Theory

__all__ = ["FLOOR", "answers", "collapse_depth", "critical_context", "largest_branch", "largest_query_std"]

Array = NDArray[np.float64]

FLOOR: Final = 8 * float(np.finfo(np.float32).eps)
"""Residual below which tokens differ by float32's rounding alone: 8 ε."""

_CARRIED = 0.01  # share of a token that the next layers can still tell apart
_PASSED = 0.25  # of differences between tokens, beside a mean that attention passes on whole
_MERGED = 0.99  # similarity from which on tokens count as one
_DEEPEST = 64
_LONGEST = 26  # doublings of a token
_DEVIATIONS = (1e-4, 1e2)
_SEEN = 4  # blocks before it is said that more of them change nothing
_SCALES = (1e-2, 1e2)
_KEY = "giorlandino_goldt"


def answers(architecture: Architecture, theories: Sequence[Theory]) -> Iterator[Answer]:
    """Answers of the mean-field map, where it speaks of the architecture.

    The uncertainty is that of what goes in: the token correlation by two standard errors to each side, and the gains of
    weights, which differ from draw to draw by a share 2/√width. That the theory may be wrong is in no interval: lay it
    over a measurement.

    Args:
        architecture: of which.
        theories: those that speak of it.

    Yields:
        Collapse depth, critical context, residual scale, standard deviation of queries and keys.
    """
    if any(one.key == _KEY for one in theories):
        yield collapse_depth(architecture)
        yield critical_context(architecture)
        yield largest_branch(architecture)
        yield largest_query_std(architecture)


def collapse_depth(architecture: Architecture) -> Answer:
    """Blocks after which what is particular to a token is float32's rounding, were the stack so deep."""
    deepest = max(_DEEPEST, architecture.depth)
    block = BlockMap.of(parameters_of(architecture, depth=deepest, **_uncertain(architecture)))
    shape, share = block.parameters.shape, 1 - 1 / architecture.context
    first = {limit: np.full(shape, math.inf) for limit in (_CARRIED, FLOOR**2)}
    before = np.full(shape, math.inf)
    for number, layer in enumerate(layers(block)):
        left = share * (1 - late(block, layer.out).similarity)
        for limit, found in first.items():
            found[(left < limit) & np.isinf(found)] = number
        if np.isfinite(first[FLOOR**2]).all() or (number >= _SEEN and _never(before, left, deepest - number)):
            break
        before = left

    def said(found: Array) -> str:
        return f"after {found[0]:.0f} blocks" if math.isfinite(found[0]) else f"in no depth up to {deepest}"

    if math.isinf(first[_CARRIED][0]):
        says = (
            f"What is particular to a token stays above 1 % of the stream's energy in any depth up to {deepest} (it "
            f"has {architecture.depth})"
        )
    else:
        says = (
            f"What is particular to a token falls below 1 % of the stream's energy {said(first[_CARRIED])}, and to "
            f"float32's rounding {said(first[FLOOR**2])} (it has {architecture.depth})"
        )
    return _answer("collapse-depth", first[FLOOR**2], "depth", says)


def critical_context(architecture: Architecture) -> Answer:
    """Tokens at which the first layer's attention passes a quarter of the differences between tokens on."""
    inputs = _uncertain(architecture)
    inputs["correlation"] = np.maximum(inputs["correlation"], 0.0)  # no mean cosine is negative in a long context
    contexts = np.unique(np.round(2 ** np.linspace(1, _LONGEST, 4 * _LONGEST)).astype(np.int64))[:, None]
    block = BlockMap.of(parameters_of(architecture, context=contexts, **inputs))
    read = block.read(block.start())
    written, _ = block.attention(read)
    with np.errstate(divide="ignore", invalid="ignore"):
        passed = (written.q[-1] - written.p[-1]) / (block.parameters.value_gain * (read.q[-1] - read.p[-1]))
    if not np.isfinite(passed).all():
        says = "The first layer's attention is given nothing that tells tokens apart, or passes nothing on"
        return Answer("critical-context", None, None, None, "context", _KEY, says)
    found = _crossing(contexts.astype(float), np.sqrt(np.maximum(passed, 0.0)), _PASSED, falls=True)
    if found[0] <= 2:
        says = (
            "At any length the first layer's attention passes less than a quarter of the differences between tokens; "
            "what keeps them is the skip"
        )
        return Answer("critical-context", None, None, None, "context", _KEY, says)
    if math.isinf(found[0]):
        says = "Attention of the first layer chooses its keys at any length: differences between tokens pass through it"
    else:
        says = (
            f"From about {found[0]:.0f} tokens on, the first layer's attention passes less than a quarter of the "
            f"differences between tokens (its context is {architecture.context}); what keeps them is the skip"
        )
    return _answer("critical-context", np.round(found), "context", says)


def largest_branch(architecture: Architecture) -> Answer:
    """What multiplies both branches at most for tokens to stay apart over the whole depth (similarity below .99)."""
    inputs = _uncertain(architecture)
    low, high = (np.full(inputs["correlation"].shape, math.log(one)) for one in _SCALES)
    own = _two(architecture.attention_branch, architecture.mlp_branch)
    depth = f"over {_blocks(architecture.depth)} (it has {own})"

    def merging(low: Array, high: Array) -> tuple[Array, NDArray[np.bool_]]:
        grid = low + np.linspace(0, 1, 17)[:, None] * (high - low)
        return grid, final(architecture, residual_scale=np.exp(grid), **inputs).similarity >= _MERGED

    grid, merged = merging(low, high)
    if merged[0, 0]:
        return _apart_within(np.exp(grid[:, 0]), merged[:, 0], depth)
    always, never = merged[0], ~merged.any(0)
    at = np.clip(merged.argmax(0), 1, None)[None]
    low, high = (np.take_along_axis(grid, at - by, 0)[0] for by in (1, 0))
    grid, merged = merging(low, high)  # once more, between the two points where tokens merge
    at = np.clip(merged.argmax(0), 1, None)[None]
    found = np.where(never, math.inf, np.where(always, 0.0, np.exp(np.take_along_axis(grid, at - 1, 0)[0])))
    if math.isinf(found[0]):
        says = f"No strength of the branches up to {_SCALES[1]:g} merges tokens {depth}"
    else:
        says = (
            f"Branches times {found[0]:.3g} or less (residual_scale) keep the similarity of tokens below {_MERGED:g} "
            f"{depth}"
        )
    return _answer("residual-scale", found, "residual_scale", says)


def largest_query_std(architecture: Architecture) -> Answer:
    """The standard deviation of W_Q and W_K from which on the softmax of some block freezes on few keys."""
    if architecture.qk_norm:
        says = "Queries and keys are normed: the size of their weights does not matter to the logits"
        return Answer("qk-std", None, None, None, "qk_std", _KEY, says)
    inputs = _uncertain(architecture)
    drawn = inputs.pop("std_q") / (architecture.std_q or 1.0)
    sizes = np.geomspace(*_DEVIATIONS, 25)[:, None]
    gauge = phases(architecture, qk_std=sizes, **inputs).gauge
    scale = np.sqrt(np.where(drawn > 0, drawn, 1.0))
    frozen, partly = (_crossing(sizes, gauge, limit, falls=False) for limit in (TRANSITION, TRANSITION / 2))
    if np.isfinite(frozen).any():  # once more, close by: a soft cap bends the curve
        near = np.where(np.isfinite(frozen), frozen, 1.0) * np.geomspace(0.8, 1.25, 9)[:, None]
        close = _crossing(near, phases(architecture, qk_std=near, **inputs).gauge, TRANSITION, falls=False)
        frozen = np.where(np.isfinite(frozen), close, math.inf)
    frozen, partly = frozen / scale, partly / scale
    own = math.sqrt(architecture.std_q * architecture.std_k)
    if math.isinf(frozen[0]):
        says = f"No size of W_Q and W_K up to {_DEVIATIONS[1]:g} freezes the softmax (it has {own:.3g})"
    else:
        says = (
            f"W_Q and W_K with a standard deviation (qk_std) of {frozen[0]:.3g} or more freeze the softmax of a block "
            f"on few keys at {architecture.context} tokens, in part from {partly[0]:.3g} on (it has {own:.3g})"
        )
    return _answer("qk-std", frozen, "qk_std", says)


def _apart_within(scales: Array, merged: NDArray[np.bool_], depth: str) -> Answer:
    """Where the weakest branches merge tokens, which may be alike from the start: a stretch that keeps them apart."""
    if merged.all():
        says = f"No strength of the branches from {_SCALES[0]:g} to {_SCALES[1]:g} keeps tokens apart {depth}"
        return Answer("residual-scale", None, None, None, "residual_scale", _KEY, says)
    apart = np.flatnonzero(~merged)
    first, last = float(scales[apart[0]]), float(scales[apart[-1]])
    says = (
        f"Tokens are nearly alike from the start; branches times {first:.3g} to {last:.3g} (residual_scale) bring "
        f"their similarity below {_MERGED:g} {depth}"
    )
    return Answer("residual-scale", first, first, last, "residual_scale", _KEY, says)


def _crossing(at: Array, values: Array, limit: float, *, falls: bool) -> Array:
    """Where values over the first axis first pass a limit, straight between points on logarithmic scales.

    Returns:
        Of the shape of the other axes: the first point where it is passed there already, infinite where nowhere.
    """
    beyond = values < limit if falls else values > limit
    first = np.where(beyond.any(0), beyond.argmax(0), len(at))
    after = np.clip(first, 1, len(at) - 1)[None]
    x, y = (np.log(np.maximum(np.broadcast_to(one, values.shape), 1e-300)) for one in (at, values))
    (x0, x1), (y0, y1) = ([np.take_along_axis(one, after + by, 0)[0] for by in (-1, 0)] for one in (x, y))
    share = np.clip((math.log(limit) - y0) / np.where(y1 == y0, 1.0, y1 - y0), 0.0, 1.0)
    between = np.exp(x0 + share * (x1 - x0))
    return np.asarray(np.where(first == len(at), math.inf, np.where(first == 0, at[0], between)))


def _never(before: Array, left: Array, blocks: int) -> bool:
    """Whether the odds of ρ, which grow by one factor a block or by less and less, leave 3 % after so many more."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = (1 - left) / left
        then = odds * (odds * before / (1 - before)) ** blocks
    return bool(((before < 1) & (left < 1) & (1 / (1 + then) > 3 * _CARRIED)).all())


def _blocks(count: int) -> str:
    return f"{count} block{'' if count == 1 else 's'}"


# ------------------------------------------------------------ what is not known exactly


def _uncertain(architecture: Architecture) -> dict[str, Any]:
    """Arrays of what goes in: first as it is, then the corners of what it may be."""
    least, spread = -1 / (architecture.context - 1), 2 * architecture.correlation_stderr
    factors = 1 + np.array([-1.0, 1.0]) / math.sqrt(architecture.width)
    corners = [(0.0, 1.0), *product({-spread, spread}, factors)]
    by, factor = (np.array(column) for column in zip(*corners, strict=True))
    scaled = {name: getattr(architecture, name) * factor for name in ("std_q", "std_v", "std_up")}
    return {"correlation": np.clip(architecture.correlation + by, least, 1.0), **scaled}


def _answer(question: str, found: Array, field: str, says: str) -> Answer:
    return Answer(question, float(found[0]), float(found.min()), float(found.max()), field, _KEY, says)


def _two(first: float, second: float) -> str:
    return f"{first:.3g}" if first == second else f"{first:.3g} and {second:.3g}"
