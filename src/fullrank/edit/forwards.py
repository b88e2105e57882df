"""The `forward` of one module instance with edits around it.

A callable object stands in the instance's `forward` while there are edits. That survives what forward hooks do not: a
model that was compiled before is compiled again, activation checkpointing repeats it, wrappers for several processes
and copies of the model take it along; and no name in `state_dict` changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from fullrank.capture.tap import recomputing
from fullrank.errors import EditError

__all__ = ["Around", "Begin", "EditedForward", "Enclosed", "Turns", "edits_in"]

Run = Callable[..., Any]


class Around(Protocol):
    """Runs a forward, or something in its place.

    Attributes:
        what: it does, in a few words.
        rank: 0, or none, for what a module computes; 1 for what becomes of what it returns; 2 for who watches that.
            Edits of a lower rank are nearer to the module's own forward, whenever they were made.
    """

    what: str

    def __call__(self, forward: EditedForward, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """What the module returns, given what it was called with and the forward inside."""


class EditedForward:
    """Stands in the `forward` of a module instance; of one rank the edit that came first is nearest to its own forward.

    Attributes:
        module: the module.
        original: what stood in the instance's `forward` before; None where its class provides it.
        arounds: the edits, innermost first.
        running: what is rewriting attention calls of the module now, outermost first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Run | None = module.__dict__.get("forward")
        self.arounds: list[Around] = []
        self.running: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the edits around it."""
        run = self._unedited
        for around in self.arounds:
            run = _enclose(around, self, run)
        return run(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._unedited)

    @property
    def _unedited(self) -> Run:
        return self.original if self.original is not None else type(self.module).forward.__get__(self.module)


def _enclose(around: Around, forward: EditedForward, run: Run) -> Run:
    def enclosed(*args: Any, **kwargs: Any) -> Any:
        return around(forward, run, args, kwargs)

    return enclosed


class Enclosed:
    """One edit around the forward of one module.

    Args:
        module: the module.
        around: the edit.
    """

    def __init__(self, module: nn.Module, around: Around) -> None:
        found = module.__dict__.get("forward")
        if isinstance(found, EditedForward):
            self._forward = found
        else:
            self._forward = EditedForward(module)
            module.forward = self._forward
        arounds = [*self._forward.arounds, around]
        self._forward.arounds = sorted(arounds, key=lambda one: getattr(one, "rank", 0))
        self._around = around

    def check(self) -> None:
        """Refuse where something else was put over the edited forward since, and would call it for ever.

        Raises:
            EditError: in that case.
        """
        forward = self._forward
        if len(forward.arounds) == 1 and forward.module.__dict__.get("forward") is not forward:
            raise EditError(
                f"the forward of a {type(forward.module).__name__} was replaced after it was edited; take that "
                "replacement away first, then undo."
            )

    def undo(self) -> None:
        """Take the edit away; after the last one the instance's `forward` is what it was."""
        forward = self._forward
        forward.arounds = [around for around in forward.arounds if around is not self._around]
        if not forward.arounds and forward.module.__dict__.get("forward") is forward:
            if forward.original is None:
                del forward.module.forward
            else:
                forward.module.forward = forward.original

    def leave(self) -> None:
        """As undoing: there is nothing to keep in a forward."""
        self.undo()


class Turns:
    """Which call of several is happening, counted within one forward of the model.

    Args:
        number: how many there are in one forward.
        in_one: whether they all happen within one call of the module.
    """

    def __init__(self, number: int, *, in_one: bool = False) -> None:
        self.number, self.in_one = number, in_one
        self.place = 0

    def begin(self) -> None:
        """A call of the module begins.

        Raises:
            EditError: where activation checkpointing repeats calls of a shared module out of their order.
        """
        if self.number == 1 or torch.compiler.is_compiling() or not recomputing():
            return
        if not self.in_one:
            raise EditError(
                "a module that is called several times in a forward cannot be edited under activation checkpointing: "
                "which of its calls is repeated is not known; switch checkpointing off."
            )
        self.place = 0

    def next(self) -> int:
        """The turn that begins, from 0."""
        if self.number == 1:
            return 0
        turn, self.place = self.place, (self.place + 1) % self.number
        return turn

    def reset(self) -> None:
        """A forward of the model begins."""
        self.place = 0


class Begin:
    """Around the model: starts counting again, also after a forward that was left in the middle."""

    what = "count the calls of shared modules"

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __call__(self, forward: EditedForward, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Run the model's forward."""
        self._turns.reset()
        return run(*args, **kwargs)


def edits_in(model: nn.Module) -> tuple[str, ...]:
    """What is changed in the forwards of a model, also of a copy that was made while edits were in force.

    Returns:
        A line for each edited module, such as `layers.2: skip the block`.
    """
    lines: list[str] = []
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, EditedForward):
            lines.extend(f"{name or type(module).__name__}: {around.what}" for around in forward.arounds)
    return tuple(lines)
