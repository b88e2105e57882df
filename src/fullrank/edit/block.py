"""Rewriting what a block makes of its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.edit.at_block import AtBlock, block_of, given, refuse_chain, with_state
from fullrank.edit.forwards import Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import Place, chosen_layers, enclosing, module_at, one_stack, place_in
from fullrank.edit.registered import Added, refuse_wrapped
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
    refuse_chain(found, "rewrite_block")
    path, turns, wanted = block_of(found, layer)
    around = _RewriteBlock(place_in(found, layer, "out", path), turns, wanted, after)
    if isinstance(after, nn.Module):
        refuse_wrapped(model, after)

    def changes() -> Iterator[Callable[[], Change]]:
        if isinstance(after, nn.Module):
            yield lambda: Added(module_at(model, path), name, after)
        yield from enclosing(model, path, around, turns)

    numbers = sum(p.numel() for p in after.parameters()) if isinstance(after, nn.Module) else 0
    return make(_RewriteBlock.what, [f"{found.name} layer {layer} ({path})"], changes(), numbers)


class _RewriteBlock(AtBlock):
    what = "rewrite the block"

    def __init__(self, place: Place, turns: Turns, wanted: int, after: After) -> None:
        super().__init__(place, turns, wanted)
        self._after = after

    def edit(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = self.place.stream(args, kwargs)
        output = given(run, args, kwargs, stream, stream.clone())
        state = self.place.state(output)
        returned = self.place.tokens(state)
        new = self._after(self.place.tokens(stream), returned)
        if not isinstance(new, Tensor) or new.shape != returned.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise EditError(f"after returned {found} for block {self.place.path}, not {tuple(returned.shape)}.")
        return with_state(output, self.place.layout.back(new.to(state.dtype), state))
