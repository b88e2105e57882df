"""Scaling what a branch adds to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fullrank.edit.at_block import with_state
from fullrank.edit.branches import Branches
from fullrank.edit.fitting import broadcasts
from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import enclosing, module_at
from fullrank.edit.registered import Added, refuse_wrapped
from fullrank.errors import EditError

__all__ = ["scale_branch"]


def scale_branch(
    model: nn.Module,
    branches: Branches,
    *,
    by: float | Tensor | Callable[[Tensor], Tensor],
    stack: str | None = None,
    layer: int | None = None,
    branch: str | None = None,
    name: str = "scale",
) -> Edit:
    """Multiply what a branch adds to the stream: X + by · F(X) in place of X + F(X); 0 removes the branch.

    F is what the module computes with all its other edits: one that replaces it later, as `replace_module` does, comes
    before the scale.

    Args:
        model: the model.
        branches: what `find_branches` found.
        by: a number, a tensor per feature or one that broadcasts to what is added, or a function of what is added. An
            `nn.Parameter` or a module becomes part of the module that returns the branch, under `name`, so that
            optimisers, `state_dict`, `to()` and DDP find it.
        stack: only in this stack.
        layer: only in this block call.
        branch: `attention`, `cross`, `mlp`, or with a number (`mlp.1`); all by default.
        name: under which a parameter or a module is registered.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such branch, or the name is taken.
    """
    chosen = branches.chosen(stack, layer, branch)
    registered = isinstance(by, nn.Parameter | nn.Module)
    if isinstance(by, nn.Parameter | nn.Module):
        refuse_wrapped(model, by)
    turns_of: dict[tuple[str, int | str], set[int]] = {}
    calls = {one.path: one.calls for one in chosen}
    for one in chosen:
        turns_of.setdefault((one.path, one.item), set()).add(one.turn)

    def changes() -> Iterator[Callable[[], Change]]:
        for (path, item), turns_wanted in turns_of.items():
            if registered:
                yield lambda path=path: Added(module_at(model, path), name, by)  # type: ignore[misc, arg-type]
            turns = Turns(calls[path])
            yield from enclosing(model, path, _Scale(by, item, turns_wanted, turns, path), turns)

    where = [f"{one.stack} layer {one.layer} {one.name} ({one.path})" for one in chosen]
    parameters = by.parameters() if isinstance(by, nn.Module) else [by] if isinstance(by, nn.Parameter) else []
    return make("scale the branch", where, changes(), sum(p.numel() for p in parameters))


class _Scale:
    what = "scale the branch"
    rank = 1  # whatever the module computes in place of its own, also where that is put there later

    def __init__(self, by: Any, item: int | str, wanted: set[int], turns: Turns, path: str) -> None:
        self._by, self._item, self._wanted, self._turns, self._path = by, item, wanted, turns, path

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self._turns.begin()
        turn = self._turns.next()
        output = run(*args, **kwargs)
        if turn not in self._wanted:
            return output
        added = output if isinstance(output, Tensor) else output[self._item]
        by = self._by
        if isinstance(by, Tensor) and not broadcasts(by.shape, added.shape):
            raise EditError(f"what {self._path} adds is {tuple(added.shape)}, and by= is {tuple(by.shape)}.")
        scaled = by(added) if callable(by) else added * by
        if not isinstance(scaled, Tensor) or scaled.shape != added.shape:
            shape = tuple(scaled.shape) if isinstance(scaled, Tensor) else type(scaled).__name__
            raise EditError(f"what {self._path} adds is {tuple(added.shape)}, and scaled it would be {shape}.")
        return with_state(output, scaled.to(added.dtype), self._item)
