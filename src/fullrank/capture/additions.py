"""The sums that a block makes of its stream: which state goes on, and what is added to it.

From the block's output back to its input, over the last tensor that all ways between two sums lead through.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.residual import ADD
from fullrank.capture.upstream import CARRIED, Region

__all__ = ["Addition", "Sums", "Unfollowed", "gate_of", "sums_of"]


class Unfollowed(Exception):  # noqa: N818 - a reason on its way to a sentence, never shown as an error
    """Why the sums of a block are not known."""


@dataclass(frozen=True, eq=False)
class Addition:
    """One sum.

    Attributes:
        start: the state before: the block's input, or the sum before this one.
        state: what of it is added to, after norms and factors; `start` itself where there are none.
        branch: what is added.
        total: the sum.
    """

    start: Ref
    state: Ref
    branch: Ref
    total: Ref


@dataclass(frozen=True, eq=False)
class Sums:
    """What a block makes of its stream.

    Attributes:
        stream: what it is called with.
        additions: in order.
        output: what it returns: the last sum after norms and factors.
        states: orders of the calls that hand the stream on.
    """

    stream: Ref
    additions: tuple[Addition, ...]
    output: Ref
    states: frozenset[int]

    @property
    def places(self) -> tuple[Ref, ...]:
        """Every tensor that a branch may read: states before and after norms and factors, latest first."""
        found = [ref for one in self.additions for ref in (one.start, one.state)]
        return tuple(dict.fromkeys(reversed(found)))


def sums_of(region: Region, stream: Ref, output: Ref) -> Sums:
    """Follow the sums of one block.

    Args:
        region: its calls.
        stream: what it was called with.
        output: the state that it returned.

    Returns:
        The sums.

    Raises:
        Unfollowed: where the state goes on through something that is no sum and no function of one state.
    """
    states = region.states(stream)
    found: list[Addition] = []
    end = output
    while True:
        sum_ = gate_of(end, states, lambda node: node is stream.node or _summands(node, states) is not None)
        if sum_ is None:
            raise Unfollowed("the states of its blocks could not be followed from sum to sum")
        if found:
            found[-1] = Addition(sum_, _origin(found[-1].state, sum_), found[-1].branch, found[-1].total)
        if sum_.node is stream.node:
            if not found:
                raise Unfollowed("its blocks add nothing to their stream")
            return Sums(stream, tuple(reversed(found)), output, frozenset(states))
        summands = _summands(sum_.node, states)
        assert summands is not None
        found.append(Addition(stream, summands[0], summands[1], sum_))
        end = summands[0]


def gate_of(start: Ref, states: Collection[int], wanted: object) -> Ref | None:
    """The nearest tensor of some kind that all ways from the stream to a tensor lead through.

    Args:
        start: the tensor.
        states: orders of the calls that hand the stream on.
        wanted: whether a call makes one that is looked for.

    Returns:
        The tensor, `start` itself where it is one; None where ways part before they meet in one.
    """
    assert callable(wanted)
    waiting: dict[int, Ref] = {start.node.order: start}
    while waiting:
        order = max(waiting)
        ref = waiting.pop(order)
        if wanted(ref.node):
            return None if waiting else ref
        for parent in ref.node.parents:
            if parent.node.order in states and parent.node.floating:
                if waiting.get(parent.node.order, parent).index != parent.index:
                    return None
                waiting[parent.node.order] = parent
    return None


def _origin(ref: Ref, first: Ref) -> Ref:
    """The tensor before casts, copies and dropout, not before a given one."""
    while ref.node.name in CARRIED and ref.node is not first.node:
        ref = ref.node.parents[0]
    return ref


def _summands(node: Node, states: Collection[int]) -> tuple[Ref, Ref] | None:
    """State and branch of a call that adds the two; None for any other call."""
    if node.name not in ADD:
        return None
    both = [parent for parent in node.parents if parent.node.data and parent.node.floating]
    if len(both) != 2:
        return None
    mine = [parent for parent in both if parent.node.order in states]
    branches = [parent for parent in both if parent.node.order not in states]
    return (mine[0], branches[0]) if len(mine) == 1 else None
