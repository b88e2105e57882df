"""Which modules an edit means: stacks, layers and parts, as capture names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.layout import PLAIN, Layout
from fullrank.capture.reference import module_names
from fullrank.capture.tensors import first_state, stream_input
from fullrank.capture.wrappers import bare
from fullrank.edit.forwards import Around, Begin, EditedForward, Enclosed, Turns
from fullrank.edit.handle import Change
from fullrank.edit.looked_into import Passing
from fullrank.errors import EditError

__all__ = [
    "Place",
    "chosen_layers",
    "chosen_stacks",
    "enclosing",
    "module_at",
    "modules_by_name",
    "one_stack",
    "place_in",
]


@dataclass(frozen=True)
class Place:
    """Where something happens in a forward.

    Attributes:
        stack: name of the stack.
        layer: n for the n-th block call.
        part: of an attention call: `self`, `cross`, `self.1`, …; of a state: `out`.
        path: name of the module.
        layout: which axes of the stream hold sequences, tokens and features.
        at: the place or name under which the block is given its stream, where it is not the first tensor that could be.
    """

    stack: str
    layer: int
    part: str
    path: str
    layout: Layout = PLAIN
    at: int | str | None = None

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The stream among what the block is called with.

        Returns:
            The tensor itself.

        Raises:
            EditError: where there is none.
        """
        found = stream_input(args, kwargs, self.at)
        if found is None:
            raise EditError(f"block {self.path} is not called with a tensor that could be its stream.")
        return found

    def state(self, output: Any) -> Tensor:
        """The stream in what the block returns.

        Returns:
            The tensor itself.

        Raises:
            EditError: where there is none.
        """
        found = first_state(output)
        if found is None:
            raise EditError(f"block {self.path} returns no tensor that could be its stream.")
        return found

    def tokens(self, state: Tensor) -> Tensor:
        """A state of the stream as (sequences, tokens, width).

        Returns:
            A view where it can be one.

        Raises:
            EditError: where it is not known which axis holds the tokens.
        """
        found = self.layout.tokens(state)
        if found is None:
            raise EditError(f"the stream at {self.path} is {tuple(state.shape)}: which axis holds tokens is not known.")
        return found


def place_in(stack: Stack, layer: int, part: str, path: str) -> Place:
    """A place in a stack that capture has found."""
    return Place(stack.name, layer, part, path, stack.layout, stack.at)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names in the model, and by those in what `torch.compile` and data parallelism wrap."""
    return {name: module for one in (bare(model), model) for module, name in module_names(one).items()}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of a name.

    Returns:
        It, to be edited.

    Raises:
        EditError: where the model has none of that name.
    """
    found = modules_by_name(model).get(path)
    if found is None:
        raise EditError(f"{path!r} is no module of this {type(bare(model)).__name__}.")
    return found


def one_stack(anatomy: Anatomy, stack: str | None) -> Stack:
    """The stack of that name, or the only one.

    Returns:
        The stack.

    Raises:
        EditError: where there is none, or several and none is named.
    """
    found = chosen_stacks(anatomy, stack)
    if len(found) > 1:
        raise EditError(f"stack= is needed: this model has {_names(anatomy)}.")
    return found[0]


def chosen_stacks(anatomy: Anatomy, stack: str | None) -> list[Stack]:
    """The stack of that name, or all.

    Returns:
        At least one.

    Raises:
        EditError: where there is none of that name.
    """
    found = [one for one in anatomy.stacks if stack in (None, one.name)]
    if not found:
        raise EditError(f"stack={stack!r} is none of this model's stacks, which are {_names(anatomy)}.")
    return found


def chosen_layers(stack: Stack, layer: int | None, *, first: int = 1) -> list[int]:
    """That layer of a stack, or all.

    Returns:
        Numbers of block calls, from 1; 0 is what the first is given.

    Raises:
        EditError: where the stack has no such layer.
    """
    layers = range(first, len(stack.paths) + 1)
    if layer is None:
        return list(layers)
    if layer not in layers:
        raise EditError(f"layer={layer!r}, but the stack {stack.name} has layers {first} to {len(stack.paths)}.")
    return [layer]


def enclosing(model: nn.Module, path: str, around: Around, turns: Turns) -> Iterator[Callable[[], Change]]:
    """The changes that put an edit around a module of a model.

    The fused fast path of `nn.TransformerEncoder` and its layers calls none of their modules: it is switched off while
    a module runs in which something is edited.

    Args:
        model: the model.
        path: name of the module.
        around: the edit.
        turns: counts the module's calls, where it is shared.

    Yields:
        Functions that make the changes.
    """
    target = module_at(model, path)
    if turns.number > 1:
        yield lambda: Enclosed(bare(model), Begin(turns))
    for module in bare(model).modules():
        if isinstance(module, _FUSED) and any(child is target for child in module.modules()):
            yield lambda module=module: Enclosed(module, Reference())  # type: ignore[misc]
    yield lambda: Enclosed(target, around)


_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Reference:
    """Around a module with a fused path of its own: it takes the one that calls its modules where a mode is active."""

    what = "no fused path"

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        with Passing():  # not the process-wide switch, which the compiler does not follow
            return run(*args, **kwargs)


def _names(anatomy: Anatomy) -> str:
    return ", ".join(stack.name for stack in anatomy.stacks) or "none"
