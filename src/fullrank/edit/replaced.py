"""Replacing what a module computes while its parameters stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import enclosing, module_at
from fullrank.edit.registered import Added, refuse_wrapped

__all__ = ["replace_module"]

Instead = Callable[..., Any]
"""Called with the module's own forward and what the module is called with; returns what the module is to return."""


def replace_module(model: nn.Module, path: str, instead: Instead, *, name: str = "instead") -> Edit:
    """Let a module compute something else: `instead(run, *args)` in place of `run(*args)`, its own forward.

    The module and its parameters stay, under their names in `state_dict`, whether `instead` calls `run` or not: a
    norm's output may be rescaled, or its input left as it is. Every call of the module is meant, also where several
    layers share it. A module that is only asked for its weights, as the output projection of `nn.MultiheadAttention`
    is, computes nothing, and nothing changes.

    Args:
        model: the model.
        path: name of the module.
        instead: what it computes. A module becomes a child of the one at `path`, under `name`, so that optimisers,
            `state_dict`, `to()` and DDP find its parameters.
        name: under which a module is registered.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such module, or the name is taken.
    """
    module = module_at(model, path)
    added = instead if isinstance(instead, nn.Module) else None
    if added is not None:
        refuse_wrapped(model, added)

    def changes() -> Iterator[Callable[[], Change]]:
        if added is not None:
            yield lambda: Added(module, name, added)
        yield from enclosing(model, path, _Instead(instead), Turns(1))

    numbers = 0 if added is None else sum(p.numel() for p in added.parameters())
    return make(_Instead.what, [path], changes(), numbers)


class _Instead:
    what = "replace what the module computes"

    def __init__(self, instead: Instead) -> None:
        self._instead = instead

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        return self._instead(run, *args, **kwargs)
