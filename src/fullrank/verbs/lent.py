"""The anatomy of a model, lent to a twin that is made of the same modules: one forward less."""

from __future__ import annotations

from torch import nn

from fullrank.capture import Anatomy
from fullrank.capture.events import Event, Signal, StreamState
from fullrank.errors import ModelError
from fullrank.table import Row

__all__ = ["Followed", "is_lent"]


class Followed:
    """Watches that a forward passes the blocks of an anatomy in its order, and ends it where it does not.

    Which blocks are called may hang on numbers (depth that adapts to the input), and those of a twin are others.

    Args:
        anatomy: the one that was lent.
    """

    needs: frozenset[Signal] = frozenset({"stream"})

    def __init__(self, anatomy: Anatomy) -> None:
        self._paths = {stack.name: stack.paths for stack in anatomy.stacks}

    def see(self, event: Event) -> None:
        """Compare the block that a state comes from with the one of its layer.

        Raises:
            ModelError: where it is another.
        """
        if not isinstance(event, StreamState) or event.layer == 0 or (event.site, event.part) != ("stream", "out"):
            return
        expected = self._paths[event.stack][event.layer - 1]
        if event.path != expected:
            raise ModelError(f"its {event.stack} passes {event.path} as layer {event.layer}, and not {expected}.")

    def rows(self) -> list[Row]:
        """None: nothing is measured."""
        return []

    def merge(self, other: Followed) -> None:
        """Nothing is merged."""


def is_lent(anatomy: Anatomy, model: nn.Module | None, twin: nn.Module) -> bool:
    """Whether a survey of the twin would find what that of its model found.

    Args:
        anatomy: of the model.
        model: what was surveyed; None where it is not at hand.
        twin: of `diagnosis.reinitialised`.

    Returns:
        True where both are made of the same modules under the same names, run by their classes' own forwards, and every
        block is one layer: how often a shared one is called may hang on numbers.
    """
    once = all(len(stack.paths) == len(set(stack.paths)) > 1 for stack in anatomy.stacks)
    return once and model is not None and _made_of(model) == _made_of(twin)


def _made_of(model: nn.Module) -> dict[str, tuple[type, bool]]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: (type(module), "forward" in vars(module)) for name, module in modules}
