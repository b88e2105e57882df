"""How tokens are told apart by position before the first block: a learned table, a fixed one, or not at all."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.replay import CannotReplay, Replay
from fullrank.capture.survey import Forward

__all__ = ["positions_of_input"]


def positions_of_input(
    replay: Replay, forward: Forward, stack: int, tokens: int
) -> Literal["learned", "sinusoidal", "none"]:
    """Look upstream of a stack for something that differs from token to token and is made of no input.

    Args:
        replay: of the forward's calls.
        forward: one that was followed.
        stack: index of the stack.
        tokens: in its stream.

    Returns:
        `learned` where a parameter went into it, `sinusoidal` where none did.
    """
    span = forward.spans.of(forward.visits[stack][0])
    if span is None or span.stream is None:
        return "none"
    found: Literal["learned", "sinusoidal", "none"] = "none"
    waiting, seen = [span.stream], set()
    while waiting:
        ref = waiting.pop()
        if (ref.node.order, ref.index) in seen:
            continue
        seen.add((ref.node.order, ref.index))
        if not ref.node.floating:
            continue
        told = _differs(replay, ref, tokens)
        if told and _learned(ref.node):
            return "learned"
        if told:
            found = "sinusoidal"
        elif ref.node.name != "embedding":
            waiting.extend(ref.node.parents)
    return found


def _differs(replay: Replay, ref: Ref, tokens: int) -> bool:
    """Whether a tensor holds one vector for each token and was made of positions alone."""
    node = ref.node
    if node.name == "embedding":
        return any(not parent.node.floating and _rising(replay, parent) for parent in node.parents)
    if node.data or len(ref.shape) < 2 or ref.shape[-2] not in (tokens, tokens - 1):
        return False
    try:
        value = replay.value(ref)
    except CannotReplay:
        return False
    return bool((value - value[..., :1, :]).any())


def _rising(replay: Replay, indices: Ref) -> bool:
    """Whether a table is looked up at one entry after the other."""
    try:
        steps: Tensor = replay.value(indices).diff(dim=-1)
    except (CannotReplay, RuntimeError):
        return False
    return steps.numel() > 0 and float((steps == 1).float().mean()) > 0.5


def _learned(node: Node) -> bool:
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current.name == "parameter":
            return True
        if current.order not in seen:
            seen.add(current.order)
            waiting.extend(parent.node for parent in current.parents)
    return False
