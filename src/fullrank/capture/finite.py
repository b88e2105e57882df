"""Where a model stops being finite: the first parameter, or the first module of a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.reference import module_names, reference_path
from fullrank.capture.tensors import tensors_in

__all__ = ["first_nonfinite_module", "first_nonfinite_parameter"]


def first_nonfinite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter with a NaN or an infinity in it, or None."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
            continue
        if parameter.dtype == torch.float4_e2m1fn_x2:
            continue  # has neither
        values = parameter.detach()
        if isinstance(getattr(values, "_local_tensor", None), Tensor):
            sharded: Any = values
            values = sharded.to_local()  # what this process holds
            if not values.numel():
                continue
        if values.dtype.itemsize == 1:
            values = values.bfloat16()  # float8 has no extremes; every one of its values is one of bfloat16
        # the extremes carry NaN and infinity along, and need no copy of a large embedding as `isfinite` does
        try:
            finite = bool(torch.isfinite(torch.stack(values.aminmax())).all())
        except (NotImplementedError, RuntimeError, TypeError):
            continue  # numbers in a quantisation library's own form: what they make of the activations is looked at
        if not finite:
            return name.replace("_orig_mod.", "")
    return None


def first_nonfinite_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module whose output is the first to hold a NaN or an infinity while its inputs are finite.

    The first tensor that a module takes or gives is looked at as a state, in which −inf is a fault too; any other may
    be a mask, which holds −inf by right.

    Args:
        model: the model that `forward` runs.
        forward: one forward pass.

    Returns:
        The module's name, or None where every output is finite. A module that hands on what it was given is not named.
    """
    found: list[str] = []
    names = {module: name or type(model).__name__ for module, name in module_names(model).items()}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if found:
            return
        broken, lost = _faults(output)
        if broken or lost:
            broken_before, lost_before = _faults((args, kwargs))
            # −inf among the inputs excuses −inf but not NaN: a softmax over a row of nothing but −inf is at fault
            if not broken_before and (broken or not lost_before):
                found.append(names[module])

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in names]
    try:
        with torch.no_grad(), reference_path(model, []):  # hooks in compiled graphs would never fire
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _faults(value: Any) -> tuple[bool, bool]:
    """Whether any tensor holds NaN or +inf, and whether the first one holds −inf."""
    tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
    broken = any(bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in tensors)
    return broken, bool(tensors) and bool(tensors[0].isneginf().any())
