"""Which module returns what a branch adds to the residual stream: one forward under observation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.dispatch import overriding
from fullrank.capture.reference import module_names, reference_path
from fullrank.capture.tap import Tap
from fullrank.capture.tensors import first_state, stream_input
from fullrank.capture.undisturbed import undisturbed
from fullrank.capture.wrappers import bare
from fullrank.edit.additions import Added, Additions, Leaf
from fullrank.errors import EditError

__all__ = ["Branch", "Branches", "find_branches"]


@dataclass(frozen=True)
class Branch:
    """What one branch of one block call adds to the stream, as something that a module returns.

    Attributes:
        stack: name of the stack.
        layer: n for the n-th block call.
        name: `attention`, `cross` or `mlp`, with `.1`, … where a block has several.
        path: name of the module that returns it; what happens to it after that is dropout, casts and factors.
        item: its place in what the module returns.
        turn: which call of the module it is, from 0.
        calls: how often the module is called in one forward.
        addition: which addition of the block to its stream takes it up, from 0; branches that are summed first, as in
            some parallel blocks, share one.
        operand: which operand of that addition is the stream, 0 or 1.
    """

    stack: str
    layer: int
    name: str
    path: str
    item: int | str
    turn: int
    calls: int
    addition: int = 0
    operand: int = 0


@dataclass(frozen=True)
class Branches:
    """The branches of a model, and what could not be told.

    Attributes:
        found: in the order of the forward.
        notes: a sentence for each block whose additions could not be followed to modules.
    """

    found: tuple[Branch, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.found)

    @property
    def reason(self) -> str:
        """The first of the notes, and of how many more blocks the same is said; empty where there is none."""
        if len(self.notes) < 2:
            return " ".join(self.notes)
        return f"{self.notes[0].rstrip('.')}, and so for {len(self.notes) - 1} more."

    def of(self, stack: str, layer: int) -> dict[str, Branch]:
        """The branches of one block call, by name."""
        return {branch.name: branch for branch in self.found if (branch.stack, branch.layer) == (stack, layer)}

    def chosen(self, stack: str | None, layer: int | None, branch: str | None) -> list[Branch]:
        """The branches of a stack, a layer, a name; None for all.

        Returns:
            At least one.

        Raises:
            EditError: where there is none.
        """
        wanted = {"stack": stack, "layer": layer, "name": branch}
        chosen = [one for one in self if all(value in (None, getattr(one, key)) for key, value in wanted.items())]
        if not chosen:
            asked = " ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None)
            reason = self.reason or "the branches found are: " + _listed(self)
            raise EditError(f"no branch was found at {asked or 'any place'}; {reason}")
        return chosen


def find_branches(model: nn.Module, forward: Callable[[], Any], anatomy: Anatomy) -> Branches:
    """Run one forward and find the modules that return what is added to the stream.

    From a block's output the additions are followed back to its input, through norms, casts and factors; the other
    operand of each is a branch. No name and no class of a module is asked. Where a block adds what no module returns,
    as code that calls functions does, nothing is found there, and a note says so.

    Args:
        model: the model; it is run in evaluation mode and left as it was.
        forward: one forward pass.
        anatomy: what `capture.survey` found in the same forward.

    Returns:
        The branches.
    """
    watch = _Watch(model, anatomy)
    with ExitStack() as put_back:
        put_back.enter_context(undisturbed(model))
        watch.attach(put_back)
        forward()
    return watch.branches()


@dataclass(eq=False)
class _Visit:
    """A module that runs."""

    path: str
    turn: int
    attention: int  # calls in the block before it


@dataclass(eq=False)
class _Block:
    """A block call that runs."""

    stack: int
    layer: int
    additions: Additions
    visits: dict[str, int] = field(default_factory=dict)


class _Watch:
    """Hooks on every module and a tap on every function of one forward."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._model, self._anatomy = bare(model), anatomy
        self._tap = Tap(lambda call: None, lambda sentence: None)
        self._stack_of = {path: index for index, stack in enumerate(anatomy.stacks) for path in stack.paths}
        self._layers = [0] * len(anatomy.stacks)
        self._calls: dict[str, int] = {}
        self._running: list[_Visit] = []
        self._blocks: list[_Block] = []
        self._leaves: list[tuple[str, int, str, Added]] = []
        self._notes: list[str] = []

    def attach(self, put_back: ExitStack) -> None:
        """Hooks and modes until `put_back` is closed."""
        self._tap.stance = put_back.enter_context(reference_path(self._model, []))
        for module, path in module_names(self._model).items():
            put_back.callback(module.register_forward_pre_hook(self._entering(path), with_kwargs=True).remove)
            put_back.callback(module.register_forward_hook(self._leaving()).remove)
        put_back.enter_context(overriding(self._model, self._tap))
        put_back.enter_context(self._tap)

    def branches(self) -> Branches:
        """What was found."""
        found = [
            Branch(
                stack, layer, name, leaf.path, leaf.item, leaf.turn, self._calls[leaf.path], one.addition, one.stream
            )
            for stack, layer, name, one in self._leaves
            for leaf in (one.leaf,)
        ]
        return Branches(tuple(found), tuple(self._notes))

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            turn = self._calls.get(path, 0)
            self._calls[path] = turn + 1
            index = self._stack_of.get(path)
            stream = None if index is None else stream_input(args, kwargs)
            if index is not None:
                self._layers[index] = self._layers[index] % len(self._anatomy.stacks[index].paths) + 1
            if index is not None and stream is not None:
                block = _Block(index, self._layers[index], Additions(stream))
                self._blocks.append(block)
                self._tap.traces.append(block.additions)
            block_now = self._blocks[-1] if self._blocks else None
            if block_now is not None:
                block_now.visits[path] = block_now.visits.get(path, 0) + 1
            self._running.append(_Visit(path, turn, 0 if block_now is None else block_now.additions.attention))

        return enter

    def _leaving(self) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            visit = self._running.pop()
            block = self._blocks[-1] if self._blocks else None
            if block is None:
                return
            paths = self._anatomy.stacks[block.stack].paths
            if visit.path == paths[block.layer - 1]:
                self._blocks.pop()
                self._tap.traces.remove(block.additions)
                self._describe(block, first_state(output), visit.path)
                return
            for item, tensor in _items(output):
                block.additions.made(
                    tensor, Leaf(visit.path, item, visit.turn, visit.attention, block.additions.attention)
                )

        return leave

    def _describe(self, block: _Block, output: Tensor | None, path: str) -> None:
        stack = self._anatomy.stacks[block.stack]
        found = None if output is None else block.additions.branches(output, block.visits)
        if found is None:
            self._notes.append(f"what block {path} adds to its stream is not returned by modules, or was not followed.")
            return
        parts = stack.calls[block.layer - 1]
        known = parts if len(parts) == block.additions.attention else ()
        counts: dict[str, int] = {}
        for one in found:
            name = "mlp"
            if one.events:
                cross = bool(known) and known[one.events[0]].startswith("cross")
                name = "cross" if cross else "attention"
            count = counts.get(name, 0)
            counts[name] = count + 1
            self._leaves.append((stack.name, block.layer, f"{name}.{count}" if count else name, one))


def _items(output: Any) -> Iterator[tuple[int | str, Tensor]]:
    if isinstance(output, Tensor):
        yield 0, output
    elif isinstance(output, Mapping):
        yield from ((name, item) for name, item in output.items() if isinstance(item, Tensor))
    elif isinstance(output, tuple | list):
        yield from ((index, item) for index, item in enumerate(output) if isinstance(item, Tensor))


def _listed(branches: Branches) -> str:
    names = dict.fromkeys(f"{one.stack} {one.layer} {one.name}" for one in branches)
    shown = list(names)[:8]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "") + "."
