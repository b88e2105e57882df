"""Rewriting what a block makes of its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.tensors import first_state, stream_input
from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import Place, chosen_layers, enclosing, modules_by_name, one_stack
from fullrank.edit.registered import Added, refuse_wrapped
from fullrank.edit.stream import arranged, put_back, turn_of, with_state
from fullrank.errors import EditError

__all__ = ["rewrite_block"]

After = Callable[[Tensor, Tensor], Tensor]
"""Called with the stream that a block was given and the one it returns, both (sequences, tokens, width)."""


def rewrite_block(
    model: nn.Module,
    anatomy: Anatomy,
    after: After,
    *,
    stack: str | None = None,
    layer: int,
    name: str = "rewrite_block",
) -> Edit:
    """Hand on another stream than the block returns: X_n = f(X_{n−1}, B(X_{n−1})).

    A block that writes into its input is given a copy of it. What else it returns is left as it is.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        after: `X, Y → Y`; a module becomes a child of the block, under `name`, so that optimisers, `state_dict`, `to()`
            and DDP find its parameters.
        stack: the stack; may be left out where there is one.
        layer: the n-th block call, from 1.
        name: under which a module is registered.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such block or the name is taken. A state of another shape is found in the forward.
    """
    found = one_stack(anatomy, stack)
    chosen_layers(found, layer)
    path, turns, wanted = turn_of(found.paths, layer)
    place = Place(found.name, layer, "out", path, found.tokens_first, found.grid)
    if isinstance(after, nn.Module):
        refuse_wrapped(model)

    def changes() -> Iterator[Callable[[], Change]]:
        modules = modules_by_name(model)
        if isinstance(after, nn.Module) and path in modules:
            yield lambda: Added(modules[path], name, after)
        yield from enclosing(model, path, _RewriteBlock(after, turns, wanted, place), turns)

    numbers = sum(p.numel() for p in after.parameters()) if isinstance(after, nn.Module) else 0
    return make("rewrite the block", [f"{found.name} layer {layer} ({path})"], changes(), numbers)


class _RewriteBlock:
    what = "rewrite the block"

    def __init__(self, after: After, turns: Turns, wanted: set[int], place: Place) -> None:
        self._after, self._turns, self._wanted, self._place = after, turns, wanted, place

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self._turns.begin()
        if self._turns.next() not in self._wanted:
            return run(*args, **kwargs)
        stream = stream_input(args, kwargs)
        if stream is None:
            raise EditError(f"block {self._place.path} is not called with a tensor that could be its stream.")
        copied = stream.clone()
        output = run(
            *(copied if item is stream else item for item in args),
            **{name: copied if item is stream else item for name, item in kwargs.items()},
        )
        state = first_state(output)
        if state is None:
            raise EditError(f"block {self._place.path} returns no tensor that could be its stream.")
        returned = arranged(state, self._place)
        new = self._after(arranged(stream, self._place), returned)
        if not isinstance(new, Tensor) or new.shape != returned.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise EditError(f"after returned {found} for block {self._place.path}, not {tuple(returned.shape)}.")
        return with_state(output, put_back(new.to(state.dtype), state, self._place))
