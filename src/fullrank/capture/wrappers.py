"""Wrappers that say how a model is run and change nothing of what it computes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fullrank.capture.reference import COMPILED

__all__ = ["bare", "class_name", "is_sharded", "library_class"]


def bare(model: nn.Module, notes: list[str] | None = None) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Forwards of the inner module draw on no other device and no other process, and a reducer of gradients never hears of
    them. Compiled graphs stay where they are. Wrappers that hold parts of the weights elsewhere, or add to what is
    computed (adapters), are the model and stay.

    Args:
        model: any module; nothing about it is changed.
        notes: gets a sentence where numbers of the inner module are not those of the wrapped one to the last bit.

    Returns:
        The inner module, or the model itself.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, library_class("torch._dynamo.eval_frame", "OptimizedModule")):
            model = model._orig_mod  # type: ignore[assignment]
            if notes is not None:
                notes.append(COMPILED)
        else:
            return model


def class_name(model: nn.Module) -> str:
    """The name of the class that the author of the model gave it: of what adapters wrap, and not `FSDPLlamaModel`."""
    if isinstance(model, library_class("peft", "PeftModel")):
        inner: Any = model
        return class_name(inner.get_base_model())
    sharded = library_class("torch.distributed.fsdp", "FSDPModule")
    kinds = [kind for kind in type(model).__mro__ if kind is not sharded]
    # sharding in place puts a class of its own in front, made of its marker and the model's class
    return next(kind for kind in kinds if sharded not in kind.__bases__).__name__


def is_sharded(model: nn.Module) -> bool:
    """Whether forwards of the model gather weights from other processes, so that all must run them alike."""
    kinds = tuple(library_class("torch.distributed.fsdp", name) for name in ("FSDPModule", "FullyShardedDataParallel"))
    return any(isinstance(module, kinds) for module in model.modules())


class _Nothing:
    """What no object is an instance of: a class of a library that nobody has imported."""


def library_class(module: str, name: str) -> type:
    """A class of a library, where that is imported already; else one that no object is an instance of."""
    found = getattr(sys.modules.get(module), name, _Nothing)
    return found if isinstance(found, type) else _Nothing
