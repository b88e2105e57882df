"""Edits of the residual stream: skip a block, replace a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.tensors import first_state, stream_input
from fullrank.edit.fitting import StateValue, new_value
from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.handle import Edit, make
from fullrank.edit.places import Place, chosen_layers, enclosing, one_stack
from fullrank.errors import EditError

__all__ = ["arranged", "put_back", "replace_stream", "skip_block", "turn_of", "with_state"]


def skip_block(model: nn.Module, where: Anatomy | str, *, stack: str | None = None, layer: int | None = None) -> Edit:
    """Let a block hand its input stream on: X_n = X_{n−1}.

    The block still runs, on a copy of the stream, and only the state in its output is replaced: what it returns
    beside (caches, maps, biases for the layers after it, losses of routers) and what it writes into a cache are what it
    makes of its input, so that later layers and later tokens find what they expect. Gradients reach its weights
    through those other things at most.

    Args:
        model: the model.
        where: what `capture.survey` found, or the name of a block: then all its calls are skipped.
        stack: with an anatomy: the stack; may be left out where there is one.
        layer: with an anatomy: the n-th block call, from 1.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such block. A block whose output has another shape than its input is found at the
            first forward, which raises it too.
    """
    if isinstance(where, str):
        path, turns, wanted, place = where, Turns(1), {0}, where
    else:
        found = one_stack(where, stack)
        if layer is None:
            raise EditError(f"layer= is needed: which of the {len(found.paths)} block calls of {found.name} to skip.")
        chosen_layers(found, layer)
        path, turns, wanted = turn_of(found.paths, layer)
        place = f"{found.name} layer {layer} ({path})"
    around = _Skip(turns, wanted, path)
    return make("skip the block", [place], enclosing(model, path, around, turns))


def replace_stream(
    model: nn.Module, anatomy: Anatomy, value: StateValue, *, stack: str | None = None, layer: int
) -> Edit:
    """Put something else in the place of the residual stream after a block, or before the first.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        value: a tensor that broadcasts to (sequences, tokens, width), a number, or a function of the state in this
            form. The sequences' means: `lambda X: X.mean(1, keepdim=True)`.
        stack: the stack; may be left out where there is one.
        layer: 0 for what the first block is given, n for what the n-th block call returns.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such place. A value that does not fit is found at the first forward.
    """
    found = one_stack(anatomy, stack)
    chosen_layers(found, layer, first=0)
    path, turns, wanted = turn_of(found.paths, max(layer, 1))
    place = Place(found.name, layer, "out", path, found.tokens_first, found.grid)
    around = _Replace(turns, wanted, place, value)
    where = f"{found.name} layer {layer} ({'input' if layer == 0 else 'output'} of {path})"
    return make("replace the stream", [where], enclosing(model, path, around, turns))


def turn_of(paths: tuple[str, ...], layer: int) -> tuple[str, Turns, set[int]]:
    """Name of the block of a layer, a counter of its calls, and which of them is meant."""
    path = paths[layer - 1]
    return path, Turns(paths.count(path)), {paths[: layer - 1].count(path)}


class _Skip:
    what = "skip the block"

    def __init__(self, turns: Turns, wanted: set[int], path: str) -> None:
        self._turns, self._wanted, self._path = turns, wanted, path

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self._turns.begin()
        if self._turns.next() not in self._wanted:
            return run(*args, **kwargs)
        stream = stream_input(args, kwargs)
        if stream is None:
            raise EditError(f"block {self._path} cannot be skipped: it is not called with a tensor to hand on.")
        copied = stream.clone()
        output = run(*_with_item(args, stream, copied), **_with_named(kwargs, stream, copied))
        state = first_state(output)
        if state is None or state.shape != stream.shape:
            shape = None if state is None else tuple(state.shape)
            raise EditError(
                f"block {self._path} cannot be skipped: it is called with {tuple(stream.shape)} and returns {shape}."
            )
        return with_state(output, stream)


class _Replace:
    what = "replace the stream"

    def __init__(self, turns: Turns, wanted: set[int], place: Place, value: StateValue) -> None:
        self._turns, self._wanted, self._place, self._value = turns, wanted, place, value

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self._turns.begin()
        if self._turns.next() not in self._wanted:
            return run(*args, **kwargs)
        if self._place.layer == 0:
            stream = stream_input(args, kwargs)
            if stream is None:
                raise EditError(f"block {self._place.path} is not called with a tensor that could be its stream.")
            new = self._new(stream)
            return run(*_with_item(args, stream, new), **_with_named(kwargs, stream, new))
        output = run(*args, **kwargs)
        state = first_state(output)
        if state is None:
            raise EditError(f"block {self._place.path} returns no tensor that could be its stream.")
        return with_state(output, self._new(state))

    def _new(self, state: Tensor) -> Tensor:
        new = new_value(self._value, arranged(state, self._place), f"the stream at {self._place.path}")
        return put_back(new, state, self._place)


def arranged(state: Tensor, place: Place) -> Tensor:
    """A state of the stream as (sequences, tokens, width)."""
    if state.ndim == 2:
        return state.unsqueeze(0)
    if state.ndim == 3 and place.tokens_first:
        return state.transpose(0, 1)
    if state.ndim == 4 and place.grid:
        return state.flatten(1, 2)
    return state


def put_back(new: Tensor, state: Tensor, place: Place) -> Tensor:
    """A tensor in that form as the model lays out its stream."""
    if state.ndim == 3 and place.tokens_first:
        new = new.transpose(0, 1)
    return new.reshape(state.shape)


def with_state(output: Any, state: Tensor, item: int | str = 0) -> Any:
    """What a module returned, with another tensor in one place.

    Returns:
        An output of the same kind.
    """
    if isinstance(output, Tensor):
        return state
    if isinstance(output, Mapping):
        key = list(output)[item] if isinstance(item, int) else item
        return type(output)(**{**output, key: state})
    items = [state if index == item else each for index, each in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _with_item(args: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    return tuple(new if item is old else item for item in args)


def _with_named(kwargs: dict[str, Any], old: Tensor, new: Tensor) -> dict[str, Any]:
    return {name: new if item is old else item for name, item in kwargs.items()}
