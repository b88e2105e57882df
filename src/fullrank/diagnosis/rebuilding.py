"""A model built again by its own class, where the model has kept every argument of its constructor."""

from __future__ import annotations

import copy
import inspect
import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import nn

from fullrank.diagnosis.thresholds import threshold
from fullrank.spec.quiet import forked_rng

__all__ = ["rebuilt"]


def rebuilt(model: nn.Module, device: torch.device, *, seed: int) -> tuple[nn.Module, str] | None:
    """A model of the same class, made with the same arguments: `GPT(config)` of a model that holds its `config`.

    Every argument of the constructor must be an attribute of the model under the same name, and the result must have
    the same modules, of the same classes, and the same parameters and buffers by name and shape. It is made twice, with
    two seeds, and is none where most weights do not depend on the seed: then the constructor loads them. What the
    constructor prints is dropped.

    Args:
        model: any module; nothing about it is changed.
        device: where tensors are made.
        seed: of the draws.

    Returns:
        The model and how it was made; None where it cannot be made so.
    """
    arguments = _arguments(model)
    if arguments is None or any("forward" in vars(module) for module in model.modules()):
        return None

    def build(draw: int) -> nn.Module:
        with forked_rng(draw), device, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(draw)
            made = type(model)(**copy.deepcopy(arguments))
        assert isinstance(made, nn.Module)
        return made

    try:
        other = _sums(build(seed + 1))
        twin = build(seed)
    except Exception:  # noqa: BLE001 - constructors raise what they like
        return None
    if _structure(twin) != _structure(model) or not _drawn(_sums(twin), other):
        return None
    named = f"from its own arguments ({', '.join(arguments)})" if arguments else "by its constructor"
    return twin, f"{type(model).__name__} built anew {named}"


def _arguments(model: nn.Module) -> dict[str, Any] | None:
    """What the constructor was called with, by name; None where the model does not hold all of it."""
    try:
        taken = inspect.signature(type(model)).parameters.values()
    except (TypeError, ValueError):
        return None
    held = vars(model)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(one.kind not in by_name or one.name not in held for one in taken):
        return None
    arguments = {one.name: held[one.name] for one in taken}
    # what holds weights would be copied as it is: trained
    return None if any(_holds_weights(value) for value in arguments.values()) else arguments


def _holds_weights(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_weights, value))
    if isinstance(value, dict):
        return any(map(_holds_weights, value.values()))
    return isinstance(value, nn.Module | torch.Tensor)


def _structure(model: nn.Module) -> list[Any]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items())]


def _sums(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Of every parameter that is not constant its size and its sum."""
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if values.is_floating_point() and values.numel() > 1 and bool((values != values.flatten()[0]).any()):
            found[name] = (values.numel(), float(values.double().sum()))
    return found


def _drawn(one: dict[str, tuple[int, float]], other: dict[str, tuple[int, float]]) -> bool:
    alike = sum(size for name, (size, total) in one.items() if other.get(name, (0, 0.0))[1] == total)
    return alike <= threshold("freshness.loaded") * sum(size for size, _ in one.values())
