"""Parameters and modules that an edit adds to a model, where optimisers and `state_dict` find them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fullrank.errors import EditError

__all__ = ["Added", "refuse_wrapped"]


class Added:
    """A parameter or a module that is made part of another.

    Args:
        parent: the module that is to hold it; of a sequence, which would run a module that is added to it, the last one
            of that.
        name: under which; it must be free.
        one: what is added.
    """

    def __init__(self, parent: nn.Module, name: str, one: nn.Parameter | nn.Module) -> None:
        while isinstance(one, nn.Module) and isinstance(parent, nn.Sequential) and len(parent):
            parent = parent[-1]
        if hasattr(parent, name):
            raise EditError(f"name={name!r} is taken in a {type(parent).__name__}; choose another name=.")
        setattr(parent, name, one)
        self._parent, self._name = parent, name

    def check(self) -> None:
        """It can always be taken out."""

    def undo(self) -> None:
        """Take it out."""
        delattr(self._parent, self._name)

    def leave(self) -> None:
        """Take it out: it keeps its values, and the model forgets it."""
        self.undo()


def refuse_wrapped(model: nn.Module, *added: nn.Parameter | nn.Module) -> None:
    """DDP learns of parameters when it is made: those that come later would never be averaged.

    Args:
        model: the model that something is to be added to.
        added: what is added; modules without parameters may be.

    Raises:
        EditError: where there are parameters and the model is inside data parallelism.
    """
    if not any(isinstance(one, nn.Parameter) or any(True for _ in one.parameters()) for one in added):
        return
    if any(isinstance(module, DataParallel | DistributedDataParallel) for module in model.modules()):
        raise EditError("parameters cannot be added to a model inside data parallelism; edit it before it is wrapped.")
