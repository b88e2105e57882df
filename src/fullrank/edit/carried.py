"""What attention calls of different layers share within one forward of a model: first values, earlier scores."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fullrank.capture.wrappers import bare
from fullrank.edit.forwards import EditedForward, Enclosed
from fullrank.edit.handle import Edit, make
from fullrank.errors import EditError

__all__ = ["Carried", "carry"]


class Carried:
    """What one layer puts down and later layers of the same forward find.

    Nothing is kept when the forward is over, but for what activation checkpointing needs to repeat a block: that lives
    as long as the part of the graph that is to be repeated, without a graph of its own, and belongs to its forward,
    also where several forwards come before the backward pass. A layer that is repeated puts nothing down anew, and
    finds what the forward found.
    """

    def __init__(self) -> None:
        self._live: dict[Hashable, Any] = {}  # of the forward that runs, in its graph
        self._kept: dict[Hashable, Any] = {}  # the same without a graph
        self._regions: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
        self._running = False

    def put(self, key: Hashable, value: Any) -> None:
        """Put something down; nothing happens where activation checkpointing repeats the layer.

        Args:
            key: the place of the call, or what else later layers know it by.
            value: a tensor, or tuples, lists and mappings of them.

        Raises:
            EditError: where the layer is repeated and it is not known of which forward.
        """
        if torch.compiler.is_compiling():
            self._live[key] = value
        elif self._repeated() is None:
            self._live[key] = value
            self._kept[key] = tree_map_only(Tensor, _without_graph, value)

    def get(self, key: Hashable) -> Any:
        """What was put down in this forward.

        Args:
            key: under which.

        Returns:
            The very thing; where activation checkpointing repeats the layer, tensors of the same numbers.

        Raises:
            EditError: where nothing was put down under the key, or as `put`.
        """
        kept = None if torch.compiler.is_compiling() else self._repeated()
        found = self._live if kept is None else kept
        if key not in found:
            raise EditError(
                f"nothing was carried under {key!r} in this forward: the layer that is to put it down ran not."
            )
        return found[key]

    def clear(self) -> None:
        """Forget what was put down; what checkpointed blocks need to be repeated is theirs."""
        self._live = {}
        self._kept = {}

    def _repeated(self) -> dict[Hashable, Any] | None:
        """What the forward of the layer that is repeated now had put down; None where none is repeated."""
        region = _region()
        if self._running or torch._C._current_graph_task_id() == -1:
            if region is not None:
                self._regions[region] = self._kept
            return None
        kept = None if region is None else self._regions.get(region)
        if kept is None:
            raise EditError(
                "what layers share cannot be carried through activation checkpointing with reentrance, or of regions "
                "inside regions; use use_reentrant=False, of whole blocks."
            )
        return kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def carry(model: nn.Module, carried: Carried) -> Edit:
    """Let something be shared by the layers of each forward of a model, and forgotten after it.

    Args:
        model: the model.
        carried: what edits of its attention calls put down and find. A copy of the model has its own.

    Returns:
        The handle.
    """
    whole = bare(model)
    return make(_Forward.what, [type(whole).__name__], [lambda: Enclosed(whole, _Forward(carried))])


class _Forward:
    """Around the model."""

    what = "carry between layers"

    def __init__(self, carried: Carried) -> None:
        self._carried = carried

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        carried = self._carried
        carried.clear()
        carried._running = True
        try:
            return run(*args, **kwargs)
        finally:
            carried._running = False
            carried.clear()


def _without_graph(tensor: Tensor) -> Tensor:
    """The same numbers outside of the graph: it is to be freed, and a repeated layer saves what the first one saved."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _region() -> Any:
    """The checkpointed region without reentrance that runs, or that is repeated; None outside of one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else _frame_in(hooks[0])


def _frame_in(hook: Any) -> Any:
    """The frame that a hook for saved tensors belongs to: torch keeps it in the hook's closure."""
    for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
        found = cell.cell_contents
        if isinstance(found, weakref.ref):
            found = found()
        if isinstance(found, torch.utils.checkpoint._CheckpointFrame):
            return found
    return None
