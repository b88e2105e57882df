"""How tokens are told apart by position before the first block: a learned table, a fixed one, or not at all."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fullrank.capture.lineage import INDEXING, Node, Ref
from fullrank.capture.replay import CannotReplay, Replay
from fullrank.capture.survey import Forward

__all__ = ["positions_of_input"]


def positions_of_input(replay: Replay, forward: Forward, stack: int) -> Literal["learned", "sinusoidal", "none"]:
    """Look upstream of a stack for something that differs from token to token and is made of no input.

    Args:
        replay: of the forward's calls.
        forward: one that was followed.
        stack: index of the stack.

    Returns:
        `learned` where a parameter went into it, `sinusoidal` where none did.
    """
    first = forward.visits[stack][0]
    span = forward.spans.of(first)
    if span is None or span.stream is None or first.shape is None:
        return "none"
    tokens = forward.anatomy.stacks[stack].layout.sizes(first.shape)[1]
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
        elif not _looks_up(ref.node) and not ref.node.attention:
            waiting.extend(ref.node.parents)
    return found


def _differs(replay: Replay, ref: Ref, tokens: int) -> bool:
    """Whether a tensor holds one vector for each token and was made of positions alone."""
    node = ref.node
    indices = [parent for parent in node.parents if not parent.node.floating]
    if _looks_up(node):
        return any(_rising(replay, parent) for parent in indices)
    several = len(ref.shape) > 1 and ref.shape[-2] > 1 and ref.shape[-2] in range(tokens - 2, tokens + 1)
    if not several or any(above.name == "given" for above in _above(node)):
        return False
    try:
        value = replay.value(ref)
    except CannotReplay:
        return False
    return bool((value - value[..., :1, :]).any()) or not bool(value.any())  # zeros still have to be learned


def _looks_up(node: Node) -> bool:
    """Whether rows of a table are taken, and not of the stream."""
    by_index = node.name in INDEXING and not node.data and any(not parent.node.floating for parent in node.parents)
    return node.name == "embedding" or by_index


def _rising(replay: Replay, indices: Ref) -> bool:
    """Whether a table is looked up at one entry after the other."""
    try:
        steps: Tensor = replay.value(indices).diff(dim=-1)
    except (CannotReplay, RuntimeError):
        return False
    return steps.numel() > 0 and float((steps == 1).float().mean()) > 0.5


def _learned(node: Node) -> bool:
    return any(above.name == "parameter" for above in _above(node))


def _above(node: Node) -> list[Node]:
    found: dict[int, Node] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.order not in found:
            found[current.order] = current
            waiting.extend(parent.node for parent in current.parents)
    return list(found.values())
