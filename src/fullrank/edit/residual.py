"""Rewriting the additions of branches to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.edit.adding import Adding, Function, Sum
from fullrank.edit.branches import Branch, Branches
from fullrank.edit.checkpointed import inside_checkpoints
from fullrank.edit.forwards import EditedForward, Enclosed, Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import Place, chosen_layers, chosen_stacks, enclosing, module_at, place_in
from fullrank.edit.registered import Added, refuse_wrapped
from fullrank.errors import EditError

__all__ = ["rewrite_residual"]


def rewrite_residual(
    model: nn.Module,
    anatomy: Anatomy,
    branches: Branches,
    function: Function,
    *,
    stack: str | None = None,
    layer: int | None = None,
    branch: str | None = None,
    name: str = "residual",
) -> Edit:
    """Compute f(X, F) where a block adds a branch to its stream: f in place of X + F.

    X and F are (sequences, tokens, width), whichever of them comes first in the model's sum and however the model
    writes it (`+`, `+=`, `add`, `add_`); F is what is added, after dropout, casts and factors. X is never written into,
    but by `add_`, which has to. What f returns is cast to the type that the sum would have. It may have fewer or more
    tokens than X: then the block goes on with these and returns them, and whatever else depends on the number of tokens
    (masks, positions, caches) is the caller's.

    Branches that a block sums before it adds them, as some parallel blocks do, are one addition: F is their sum.
    Of several edits of one addition the last made sees the sum that the one before it makes, where that makes one.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        branches: what `find_branches` found.
        function: `X, F → X`. A module becomes a child of the blocks, under `name`, so that optimisers, `state_dict`,
            `to()` and DDP find its parameters; where one block gets several, under `name` and that of the branch
            (`residual_attention`).
        stack: only in this stack.
        layer: only in this block call.
        branch: `attention`, `cross`, `mlp`, or with a number (`mlp.1`); all by default.
        name: under which a module is registered.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such branch, the additions of a block that is meant could not be followed, the
            branch is summed with another before it is added, or the name is taken. What can only be known in a forward
            is raised by it: a result that does not fit, an addition that is not seen any more.
    """
    chosen = branches.chosen(stack, layer, branch)
    blocks = _blocks(anatomy, branches, chosen, stack, layer)
    added = function if isinstance(function, nn.Module) else None
    if added is not None:
        refuse_wrapped(model, added)

    def changes() -> Iterator[Callable[[], Change]]:
        for path, calls in blocks.items():
            sums = dict.fromkeys(one for _, wanted in calls for one in wanted)
            if added is not None:
                for one in sums:
                    suffix = "".join(f"_{part}".replace(".", "_") for part in one.branches) if len(sums) > 1 else ""
                    yield lambda path=path, suffix=suffix: Added(module_at(model, path), name + suffix, added)  # type: ignore[misc]
            turns = Turns(len(calls))
            around = _Residual(function, calls, turns)
            yield from enclosing(model, path, around, turns)
            for leaf in dict.fromkeys(leaf for one in sums for leaf, _, _ in one.leaves):
                yield lambda leaf=leaf, around=around: Enclosed(module_at(model, leaf), _Returned(around, leaf))  # type: ignore[misc]

    where = [
        f"{place.stack} layer {place.layer} {' and '.join(one.branches)} ({path})"
        for path, calls in blocks.items()
        for place, wanted in calls
        for one in wanted
    ]
    numbers = 0 if added is None else sum(p.numel() for p in added.parameters())
    return make(_Residual.what, where, changes(), numbers)


Calls = list[tuple[Place, tuple[Sum, ...]]]
"""For each call of a block its place and the additions that are meant in it."""


def _blocks(
    anatomy: Anatomy, branches: Branches, chosen: list[Branch], stack: str | None, layer: int | None
) -> dict[str, Calls]:
    found: dict[str, Calls] = {}
    for one in chosen_stacks(anatomy, stack):
        calls: dict[str, Calls] = {}
        wanted = chosen_layers(one, layer) if stack is not None or len(anatomy.stacks) == 1 else _layers(one, layer)
        for index, path in enumerate(one.paths):
            mine = [each for each in chosen if (each.stack, each.layer) == (one.name, index + 1)]
            there = list(branches.of(one.name, index + 1).values())
            if index + 1 in wanted and not there:
                reasons = branches.reason or f"no branch was found in {path}."
                raise EditError(f"the additions of {one.name} layer {index + 1} cannot be rewritten: {reasons}")
            place = place_in(one, index + 1, "out", path)
            calls.setdefault(path, []).append((place, _sums(place, mine, there)))
        found |= {path: each for path, each in calls.items() if any(sums for _, sums in each)}
    return found


def _layers(stack: Stack, layer: int | None) -> list[int]:
    """That layer of one of several stacks, which need not all be as deep."""
    return [n for n in range(1, len(stack.paths) + 1) if layer in (None, n)]


def _sums(place: Place, mine: list[Branch], there: list[Branch]) -> tuple[Sum, ...]:
    """The additions that take up some of the branches of a block call."""
    sums = []
    for addition in dict.fromkeys(branch.addition for branch in mine):
        parts = [branch for branch in there if branch.addition == addition]
        alone = [branch for branch in mine if branch.addition == addition]
        if len(alone) < len(parts):
            names = " and ".join(part.name for part in parts)
            raise EditError(
                f"{names} of {place.stack} layer {place.layer} are summed before they are added to the stream: leave "
                f"branch={alone[0].name!r} out, and function is given their sum."
            )
        leaves = tuple((part.path, part.item, part.name) for part in parts)
        sums.append(Sum(tuple(part.name for part in parts), leaves))
    return tuple(sums)


class _Residual:
    """Around a block."""

    what = "rewrite the addition to the stream"

    def __init__(self, function: Function, calls: Calls, turns: Turns) -> None:
        self.function, self.turns = function, turns
        self.calls = tuple(calls)
        self.running: list[Adding] = []

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self.turns.begin()
        place, wanted = self.calls[self.turns.next()]
        if not wanted:
            return run(*args, **kwargs)
        shape = place.stream(args, kwargs).shape
        mode = Adding(self.function, place, shape, wanted)
        if torch.compiler.is_compiling():
            return self._run(mode, run, args, kwargs)

        def inside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mode.left = ()  # this one does it, here and when it is repeated
            return self._run(Adding(self.function, place, shape, wanted), function, args, kwargs)

        with inside_checkpoints(forward.module, inside):
            return self._run(mode, run, args, kwargs)

    def _run(self, mode: Adding, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.running.append(mode)
        try:
            with mode:
                output = run(*args, **kwargs)
        finally:
            self.running.pop()
        mode.finish(output)
        return output


class _Returned:
    """Around a module that returns what a branch adds."""

    what = "follow the branch to the stream"
    rank = 2  # edits of what the module returns come before

    def __init__(self, around: _Residual, path: str) -> None:
        self._around, self._path = around, path

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        output = run(*args, **kwargs)
        if self._around.running:
            self._around.running[-1].returned(self._path, output)
        return output
