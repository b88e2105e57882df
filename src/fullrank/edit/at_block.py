"""Around one call of a block: what is edited there sees the stream, whatever else the block takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fullrank.capture.anatomy import Stack
from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.places import Place
from fullrank.errors import EditError

__all__ = ["AtBlock", "block_of", "given", "refuse_chain", "with_state"]


class AtBlock(ABC):
    """An edit of some of the calls of a block.

    Args:
        place: of the call that is meant.
        turns: counts the block's calls, where it is shared.
        wanted: which of them, from 0.
    """

    what: str

    def __init__(self, place: Place, turns: Turns, wanted: int) -> None:
        self.place, self._turns, self._wanted = place, turns, wanted

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        """What the module returns: of the calls that are not meant, as without the edit."""
        self._turns.begin()
        if self._turns.next() != self._wanted:
            return run(*args, **kwargs)
        return self.edit(run, args, kwargs)

    @abstractmethod
    def edit(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call returns."""


def block_of(stack: Stack, layer: int) -> tuple[str, Turns, int]:
    """Name of the block of a layer, a counter of its calls, and which of them is meant."""
    path = stack.paths[layer - 1]
    return path, Turns(stack.paths.count(path)), stack.paths[: layer - 1].count(path)


def refuse_chain(stack: Stack, what: str) -> None:
    """Raise where the blocks of a stack are layers of weights with what follows each: no module call is one.

    Raises:
        EditError: there.
    """
    if stack.end is not None:
        raise EditError(
            f"{what}: the blocks of {stack.name} are layers of weights with what follows each, and no modules."
        )


def given(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor, instead: Tensor
) -> Any:
    """What a block returns when it is given another stream."""
    return run(
        *(instead if item is stream else item for item in args),
        **{name: instead if item is stream else item for name, item in kwargs.items()},
    )


def with_state(output: Any, state: Tensor, item: int | str = 0) -> Any:
    """What a module returned, with another tensor in one place; where more is nested there, in the first place of that.

    Returns:
        An output of the same kind.
    """
    if isinstance(output, Tensor):
        return state
    if isinstance(output, Mapping):
        key = list(output)[item] if isinstance(item, int) else item
        return type(output)(**{**output, key: with_state(output[key], state)})
    items = [with_state(each, state) if index == item else each for index, each in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
