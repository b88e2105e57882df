"""The additions of one block call, as a graph from its output back to its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fullrank.capture.residual import ResidualTrace

__all__ = ["Additions", "Leaf"]

_ADD = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_CARRY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "identity"}
    | {"dropout", "dropout_", "clamp", "clamp_", "view", "reshape", "nan_to_num", "transpose", "permute"}
    | {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"}
    | {"layer_norm", "rms_norm", "group_norm", "batch_norm"}
)


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


@dataclass(eq=False)
class _Node:
    """A tensor of the stream's size: where it came from and who returned it."""

    kind: Literal["input", "sum", "carried", "other"]
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
        if not isinstance(output, Tensor) or not self._is_of_size(output):
            return
        given = [item for item in args if isinstance(item, Tensor) and self._is_of_size(item)]
        if name in _ADD and len(given) == 2:
            self._put(output, "sum", given)
        elif name in _CARRY and len(given) == 1:
            if output is not given[0]:
                self._put(output, "carried", given)
        elif id(output) not in self._nodes or not any(output is item for item in given):
            self._put(output, "other", [])

    def overwrites(self, name: str, args: tuple[Any, ...]) -> None:
        """Nothing is kept by value."""

    def made(self, tensor: Tensor, leaf: Leaf) -> None:
        """A module returned a tensor."""
        if self._is_of_size(tensor):
            self._node(tensor).makers.append(leaf)

    def branches(self, output: Tensor, visits: Mapping[str, int]) -> list[tuple[Leaf, list[int]]] | None:
        """What was added on the way from the block's input to its output.

        Args:
            output: what the block returned.
            visits: how often each module was called in it.

        Returns:
            For each branch the outermost module that returned it and was called once, with the attention calls that
            made it; None where the way, or a module, is not known.
        """
        node = self._nodes.get(id(output))
        added = None if node is None else _walk(node)
        if added is None:
            return None
        found: list[tuple[Leaf, int, int]] = []
        last = 0
        for at, other in added:
            leaves = [self._leaf(part, visits) for part in _parts(other)]
            for leaf in leaves:
                if leaf is None:
                    return None
                alone = len(leaves) == 1
                found.append((leaf, last if alone else leaf.after, at.attention if alone else leaf.after))
            last = max(last, at.attention)
        inside = {event for leaf, _, _ in found for event in range(leaf.before, leaf.after)}
        described = []
        for leaf, first, after in found:
            events = list(range(leaf.before, leaf.after)) or [e for e in range(first, after) if e not in inside]
            described.append((leaf, events))
        return described

    def _leaf(self, node: _Node, visits: Mapping[str, int]) -> Leaf | None:
        while not node.makers and node.kind == "carried":
            node = node.parents[0]
        return next((leaf for leaf in reversed(node.makers) if visits.get(leaf.path) == 1), None)

    def _is_of_size(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and (tensor.numel(), tensor.shape[-1]) == self._size

    def _node(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self._nodes:
            self._nodes[id(tensor)] = _Node("other", (), self.attention)
            self._alive.append(tensor)
        return self._nodes[id(tensor)]

    def _put(self, output: Tensor, kind: Literal["sum", "carried", "other"], given: list[Tensor]) -> None:
        node = _Node(kind, tuple(self._node(item) for item in given), self.attention)
        self._nodes[id(output)] = node
        self._alive.append(output)


def _walk(node: _Node) -> list[tuple[_Node, _Node]] | None:
    """The sums between the block's input and a node, each with its other operand; None where none leads there."""
    if node.kind == "input":
        return []
    if node.kind == "carried":
        return _walk(node.parents[0])
    if node.kind == "other":
        return None
    ways = [(_walk(parent), other) for parent, other in zip(node.parents, node.parents[::-1], strict=True)]
    found = [(way, other) for way, other in ways if way is not None]
    if len(found) != 1:
        return None
    way, other = found[0]
    return [*way, (node, other)]


def _parts(node: _Node) -> list[_Node]:
    """A branch, or the branches that were summed before they were added together, as parallel blocks do."""
    if node.makers or node.kind == "other":
        return [node]
    return [part for parent in node.parents for part in _parts(parent)]
