"""The additions of one block call, as a graph from its output back to its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fullrank.capture.residual import ResidualTrace

__all__ = ["ADD", "CARRY", "LIKE", "Added", "Additions", "Leaf"]

ADD = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "iadd"})  # the last is what a compiler sees
NORM = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm"})
CARRY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "identity"}
    | {"dropout", "dropout_", "clamp", "clamp_", "view", "reshape", "nan_to_num", "transpose", "permute"}
    | {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"}
    | NORM
)
LIKE = frozenset({"type_as", "view_as", "reshape_as", "expand_as"})  # they hand the first tensor on


@dataclass(frozen=True)
class Leaf:
    """A module that returned a tensor.

    Attributes:
        path: its name.
        item: the tensor's place in what it returned.
        turn: which call of the module it was.
        before: attention calls of the block before the module ran.
        after: and when it returned.
    """

    path: str
    item: int | str
    turn: int
    before: int
    after: int


@dataclass(frozen=True)
class Added:
    """A branch as it enters an addition to the stream.

    Attributes:
        leaf: the outermost module that returned it and was called once.
        events: the attention calls that made it.
        addition: which addition to the stream takes it up, from 0; branches that are summed first share one.
        stream: which operand of that addition is the stream, 0 or 1.
    """

    leaf: Leaf
    events: list[int]
    addition: int
    stream: int


@dataclass(eq=False)
class _Node:
    """A tensor of the stream's size: where it came from and who returned it."""

    kind: Literal["input", "sum", "carried", "normed", "other"]
    parents: tuple[_Node, ...]
    attention: int  # calls before it was made
    makers: list[Leaf] = field(default_factory=list)


class Additions(ResidualTrace):
    """Follows the tensors of one block call that have the size of its stream.

    Args:
        stream: what the block is called with.
    """

    def __init__(self, stream: Tensor) -> None:
        super().__init__(stream)
        self._size = (stream.numel(), stream.shape[-1])
        self._nodes: dict[int, _Node] = {id(stream): _Node("input", (), 0)}
        self._alive: list[Tensor] = [stream]  # an id must not be used again while the block runs

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take in one function call of the block."""
        if not isinstance(output, Tensor):
            return
        given = [item for item in args if isinstance(item, Tensor) and self._is_of_size(item)]
        if name in ADD and len(given) == 2:
            self._size = (output.numel(), output.shape[-1])  # an edit may make fewer or more tokens of it
            self._put(output, "sum", given)
        elif not self._is_of_size(output):
            return
        elif (name in CARRY and len(given) == 1) or (name in LIKE and given and given[0] is args[0]):
            if output is not given[0]:
                self._put(output, "normed" if name in NORM else "carried", given[:1])
        elif id(output) not in self._nodes or not any(output is item for item in given):
            self._put(output, "other", [])

    def overwrites(self, name: str, args: tuple[Any, ...]) -> None:
        """Nothing is kept by value."""

    def made(self, tensor: Tensor, leaf: Leaf) -> None:
        """A module returned a tensor."""
        if self._is_of_size(tensor):
            self._node(tensor).makers.append(leaf)

    def branches(self, output: Tensor, visits: Mapping[str, int]) -> list[Added] | None:
        """What was added on the way from the block's input to its output.

        Args:
            output: what the block returned.
            visits: how often each module was called in it.

        Returns:
            The branches in order; None where the way, or a module, is not known.
        """
        node = self._nodes.get(id(output))
        added = None if node is None else _walk(node)
        if added is None:
            return None
        found: list[tuple[Leaf, set[int], range, int, int]] = []
        last = 0
        for index, (at, other, stream) in enumerate(added):
            parts = _parts(other)
            for part in parts:
                leaf = _leaf(part, visits)
                if leaf is None:
                    return None
                # of branches that are summed first, what ran before the sum may have made either
                since = range(last, at.attention) if len(parts) == 1 else range(0)
                found.append((leaf, _events(part), since, index, stream))
            last = max(last, at.attention)
        inside = {event for _, own, *_ in found for event in own}
        return [
            Added(leaf, sorted(own) or [event for event in since if event not in inside], index, stream)
            for leaf, own, since, index, stream in found
        ]

    def _is_of_size(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and (tensor.numel(), tensor.shape[-1]) == self._size

    def _node(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self._nodes:
            self._nodes[id(tensor)] = _Node("other", (), self.attention)
            self._alive.append(tensor)
        return self._nodes[id(tensor)]

    def _put(self, output: Tensor, kind: Literal["sum", "carried", "normed", "other"], given: list[Tensor]) -> None:
        node = _Node(kind, tuple(self._node(item) for item in given), self.attention)
        self._nodes[id(output)] = node
        self._alive.append(output)


def _walk(node: _Node) -> list[tuple[_Node, _Node, int]] | None:
    """The sums between the block's input and a node, each with its other operand and the place of the stream's.

    Returns:
        In order; None where none leads there.
    """
    if node.kind == "input":
        return []
    if node.kind in ("carried", "normed"):
        return _walk(node.parents[0])
    if node.kind == "other":
        return None
    ways = [(_walk(parent), node.parents[1 - place], place) for place, parent in enumerate(node.parents)]
    found = [(way, other, place) for way, other, place in ways if way is not None]
    if len(found) != 1:
        return None
    way, other, place = found[0]
    return [*way, (node, other, place)]


def _parts(node: _Node) -> list[_Node]:
    """A branch, or the branches that were summed before they were added together, as parallel blocks do."""
    if node.makers or node.kind == "other":
        return [node]
    return [part for parent in node.parents for part in _parts(parent)]


def _handed_on(node: _Node) -> Iterator[_Node]:
    """A tensor and those that it was carried from; what stands before a norm that a module made is not the branch."""
    yield node
    while node.kind == "carried" or (node.kind == "normed" and not node.makers):
        node = node.parents[0]
        yield node


def _leaf(node: _Node, visits: Mapping[str, int]) -> Leaf | None:
    """The outermost module that returned a branch, and that the block calls once."""
    makers = (maker for one in _handed_on(node) for maker in reversed(one.makers))
    return next((maker for maker in makers if visits.get(maker.path) == 1), None)


def _events(node: _Node) -> set[int]:
    """The attention calls inside of the modules that returned a branch, dropout behind one of them too."""
    return {e for one in _handed_on(node) for maker in one.makers for e in range(maker.before, maker.after)}
