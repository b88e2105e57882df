"""Where a model stops being finite: the first parameter, or the first module of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["first_nonfinite_module", "first_nonfinite_parameter"]


def first_nonfinite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter with a NaN or an infinity in it, or None."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        # the extremes carry NaN and infinity along, and need no copy of a large embedding as `isfinite` does
        if parameter.numel() and not bool(torch.isfinite(torch.stack(parameter.detach().aminmax())).all()):
            return name
    return None


def first_nonfinite_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module whose output is the first to hold a NaN or an infinity while its inputs are finite.

    Args:
        model: the model that `forward` runs.
        forward: one forward pass.

    Returns:
        The module's name, or None where every output is finite. A module that hands on what it was given is not named.
    """
    found: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not found and not _finite(output) and _finite((args, kwargs)):
            found.append(names[module])

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(value: Any) -> bool:
    # an attention mask may hold −inf by right: only NaN and +inf are taken for a fault
    return all(not bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
