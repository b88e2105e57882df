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
from fullrank.theory.random_energy import TRANSITION, inverse_participation, row_overlap
from fullrank.theory.theory import Theory

__all__ = ["FLOOR", "answers", "collapse_depth", "critical_context", "largest_branch", "largest_query_std"]

Array = NDArray[np.float64]

FLOOR: Final = 9.5367431640625e-07
"""Residual below which tokens differ by float32's rounding alone: 8 ε."""

_CARRIED = 0.01  # share of a token that the next layers can still tell apart
_PASSED = 0.25  # of differences between tokens, beside a mean that attention passes on whole
_MERGED = 0.99  # similarity from which on tokens count as one
_DEEPEST = 64
_LONGEST = 2.0**26
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
    for number, layer in enumerate(layers(block)):
        left = share * (1 - late(block, layer.out).similarity)
        for limit, found in first.items():
            found[(left < limit) & np.isinf(found)] = number
        if np.isfinite(first[FLOOR**2]).all():
            break

    def said(found: Array) -> str:
        return f"after {found[0]:.0f} blocks" if math.isfinite(found[0]) else f"in no depth up to {deepest}"

    if math.isinf(first[_CARRIED][0]):
        says = (
            f"What is particular to a token stays above 1 % of the stream in any depth up to {deepest} (it has "
            f"{architecture.depth})"
        )
    else:
        says = (
            f"What is particular to a token falls below 1 % of the stream {said(first[_CARRIED])}, and to float32's "
            f"rounding {said(first[FLOOR**2])} (it has {architecture.depth})"
        )
    return _answer("collapse-depth", first[FLOOR**2], "depth", says)


def critical_context(architecture: Architecture) -> Answer:
    """Tokens at which the first layer's attention passes a quarter of the differences between tokens on."""
    inputs = _uncertain(architecture)
    rho = inputs["correlation"]
    s = architecture.logit_std * inputs["std_q"] / (architecture.std_q or 1.0) * np.sqrt(np.maximum(0.0, 1 - rho))
    seen = 0.75 if architecture.mask == "causal" else 1.0

    def passes(log_context: Array) -> NDArray[np.bool_]:
        keys = seen * np.exp(log_context)
        if architecture.window is not None:
            keys = np.minimum(keys, architecture.window)
        Y2 = inverse_participation(s, keys)
        overlap = row_overlap(Y2, rho, keys, head_width=float(architecture.head_width or 1))
        return np.asarray(np.sqrt(np.maximum(0.0, Y2 - overlap)) >= _PASSED)

    low, high = np.full(s.shape, math.log(2)), np.full(s.shape, math.log(_LONGEST))
    never = passes(high)
    for _ in range(30):  # what is not the mean falls with the context
        middle = (low + high) / 2
        still = passes(middle)
        low, high = np.where(still, middle, low), np.where(still, high, middle)
    found = np.where(never, math.inf, np.exp(high))
    if math.isinf(found[0]):
        says = "Attention of the first layer chooses its keys at any length: differences between tokens pass through it"
    elif found[0] < 2.5:
        says = (
            "At any length the first layer's attention passes less than a quarter of the differences between tokens; "
            "what keeps them is the skip"
        )
    else:
        says = (
            f"From about {found[0]:.0f} tokens on, the first layer's attention passes less than a quarter of the "
            f"differences between tokens (its context is {architecture.context}); what keeps them is the skip"
        )
    return _answer("critical-context", found, "context", says)


def largest_branch(architecture: Architecture) -> Answer:
    """What multiplies both branches at most for tokens to stay apart over the whole depth (similarity below .99)."""
    inputs = _uncertain(architecture)
    low, high = (np.full(inputs["correlation"].shape, math.log(one)) for one in _SCALES)
    for _ in range(2):  # a grid, and one between the two points where tokens merge
        steps = np.linspace(0, 1, 25)[:, None]
        grid = low + steps * (high - low)
        merged = final(architecture, residual_scale=np.exp(grid), **inputs).similarity >= _MERGED
        first = np.where(merged.any(0), merged.argmax(0), len(grid))
        always, never = first == 0, first == len(grid)
        at = np.clip(first, 1, len(grid) - 1)
        low, high = (np.take_along_axis(grid, place[None], 0)[0] for place in (at - 1, at))
    found = np.where(never, math.inf, np.where(always, 0.0, np.exp((low + high) / 2)))
    own = _two(architecture.attention_branch, architecture.mlp_branch)
    depth = f"over {architecture.depth} blocks (it has {own})"
    if math.isinf(found[0]):
        says = f"No strength of the branches up to {_SCALES[1]:g} merges tokens {depth}"
    elif found[0] == 0:
        says = f"No strength of the branches from {_SCALES[0]:g} on keeps tokens apart {depth}"
        return Answer("residual-scale", None, None, None, "residual_scale", _KEY, says)
    else:
        says = (
            f"Branches times {found[0]:.3g} or less (residual_scale) keep the similarity of tokens below {_MERGED:g} "
            f"{depth}"
        )
    return _answer("residual-scale", found, "residual_scale", says)


def largest_query_std(architecture: Architecture) -> Answer:
    """The standard deviation of W_Q and W_K from which on the softmax freezes on few keys, whatever the residual."""
    if architecture.qk_norm:
        says = "Queries and keys are normed: the size of their weights does not matter to the logits"
        return Answer("qk-std", None, None, None, "qk_std", _KEY, says)
    own = math.sqrt(architecture.std_q * architecture.std_k)
    size = own or 1.0
    inputs = _uncertain(architecture)
    drawn = inputs.pop("std_q") / (architecture.std_q or 1.0)
    # in the first block tokens are farthest apart, and there the gauge goes as the square of the deviation
    gauge = phases(architecture.with_(depth=1, qk_std=size), **inputs).gauge
    with np.errstate(divide="ignore"):
        found = size * np.sqrt(TRANSITION / (gauge * np.where(drawn > 0, drawn, 1.0)))
    if math.isinf(found[0]):
        says = "Attention has nothing to choose between: no size of W_Q and W_K freezes it"
    else:
        says = (
            f"W_Q and W_K with a standard deviation (qk_std) of {found[0]:.3g} or more freeze the softmax on few keys "
            f"at {architecture.context} tokens, in part from {found[0] / math.sqrt(2):.3g} on (it has {own:.3g})"
        )
    return _answer("qk-std", found, "qk_std", says)


# ------------------------------------------------------------ what is not known exactly


def _uncertain(architecture: Architecture) -> dict[str, Any]:
    """Arrays of what goes in: first as it is, then the corners of what it may be."""
    least, spread = -1 / (architecture.context - 1), 2 * architecture.correlation_stderr
    factors = 1 + np.array([-1.0, 1.0]) / math.sqrt(architecture.width)
    corners = [(0.0, 1.0), *product((-spread, spread), factors)]
    by, factor = (np.array(column) for column in zip(*corners, strict=True))
    scaled = {name: getattr(architecture, name) * factor for name in ("std_q", "std_v", "std_up")}
    return {"correlation": np.clip(architecture.correlation + by, least, 1.0), **scaled}


def _answer(question: str, found: Array, field: str, says: str) -> Answer:
    return Answer(question, float(found[0]), float(found.min()), float(found.max()), field, _KEY, says)


def _two(first: float, second: float) -> str:
    return f"{first:.3g}" if first == second else f"{first:.3g} and {second:.3g}"
