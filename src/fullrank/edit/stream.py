"""Edits of the residual stream: skip a block, replace a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.edit.at_block import AtBlock, block_of, given, refuse_chain, with_state
from fullrank.edit.fitting import StateValue, new_value
from fullrank.edit.forwards import Turns
from fullrank.edit.handle import Edit, make
from fullrank.edit.places import Place, chosen_layers, enclosing, one_stack, place_in
from fullrank.errors import EditError

__all__ = ["replace_stream", "skip_block"]


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
        path, turns, wanted, place, named = where, Turns(1), 0, Place("", 1, "out", where), where
    else:
        found = one_stack(where, stack)
        if layer is None:
            raise EditError(f"layer= is needed: which of the {len(found.paths)} block calls of {found.name} to skip.")
        chosen_layers(found, layer)
        refuse_chain(found, "skip_block")
        path, turns, wanted = block_of(found, layer)
        place, named = place_in(found, layer, "out", path), f"{found.name} layer {layer} ({path})"
    return make(_Skip.what, [named], enclosing(model, path, _Skip(place, turns, wanted), turns))


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
    chain = found.end is not None  # then a layer ends where the next begins
    if chain and layer == len(found.paths):
        refuse_chain(found, f"replace_stream with layer={layer}")
    before = chain or layer == 0
    path, turns, wanted = block_of(found, layer + 1 if before else layer)
    around = _Replace(place_in(found, layer, "out", path), turns, wanted, value, before=before)
    where = f"{found.name} layer {layer} ({'input' if before else 'output'} of {path})"
    return make(_Replace.what, [where], enclosing(model, path, around, turns))


class _Skip(AtBlock):
    what = "skip the block"

    def edit(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = self.place.stream(args, kwargs)
        output = given(run, args, kwargs, stream, stream.clone())
        state = self.place.state(output)
        if state.shape != stream.shape:
            raise EditError(
                f"block {self.place.path} cannot be skipped: it is called with {tuple(stream.shape)} and returns "
                f"{tuple(state.shape)}."
            )
        return with_state(output, stream)


class _Replace(AtBlock):
    what = "replace the stream"

    def __init__(self, place: Place, turns: Turns, wanted: int, value: StateValue, *, before: bool) -> None:
        super().__init__(place, turns, wanted)
        self._value, self._before = value, before

    def edit(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._before:
            stream = self.place.stream(args, kwargs)
            return given(run, args, kwargs, stream, self._new(stream))
        output = run(*args, **kwargs)
        return with_state(output, self._new(self.place.state(output)))

    def _new(self, state: Tensor) -> Tensor:
        new = new_value(self._value, self.place.tokens(state), f"the stream at {self.place.path}")
        return self.place.layout.back(new, state)
