"""Activation checkpointing that begins inside a block: what is entered around the block is over when it is repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Region", "inside_checkpoints"]

Inside = Callable[..., Any]
"""Called with a function that is checkpointed and its arguments, in the forward and again in the backward pass."""


class _Entering:
    """Stands in the place of the function by which a module checkpoints itself, while it runs."""

    def __init__(self, checkpointing: Callable[..., Any], inside: Inside) -> None:
        self._checkpointing, self._inside = checkpointing, inside

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._checkpointing(functools.partial(self._inside, function), *args, **kwargs)


@contextmanager
def inside_checkpoints(module: nn.Module, inside: Inside) -> Iterator[None]:
    """While a module runs, what it checkpoints of itself runs through a function of ours.

    Some models keep `torch.utils.checkpoint.checkpoint`, with its options, in an attribute of the block, whose own
    forward passes itself through it. That attribute is told by its value and not by its name.

    Args:
        module: the module.
        inside: runs what is checkpointed.

    Yields:
        Nothing.
    """
    own = module.__dict__
    found = {name: value for name, value in own.items() if _checkpoints(value)}
    own.update({name: _Entering(value, inside) for name, value in found.items()})
    try:
        yield
    finally:
        own.update(found)


def _checkpoints(value: Any) -> bool:
    if isinstance(value, functools.partial):
        value = value.func
    return value is checkpoint or isinstance(value, _Entering)


class Region:
    """Which checkpointed region something happens in; made before, and asked when it happens.

    A region without reentrance is told by the hooks for saved tensors, one with it by the gradients that are off in it.
    """

    def __init__(self) -> None:
        self._hooks, self._gradients = _hooks(), torch.is_grad_enabled()

    def left(self) -> bool:
        """Whether a checkpointed region began since."""
        hooks = _hooks()
        began = hooks is not self._hooks and getattr(hooks, "__module__", "") == checkpoint.__module__
        return began or (self._gradients and not torch.is_grad_enabled())


def _hooks() -> Any:
    found = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if found is None else found[0]
