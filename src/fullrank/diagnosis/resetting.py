"""A deep copy of a model whose every module is initialised again by its own methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from fullrank.capture.wrappers import library_class

__all__ = ["HOOKS", "CannotReset", "others", "reset_copy"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RESETS = ("reset_parameters", "_reset_parameters")
_INITIALISES = "_init_weights"


class CannotReset(Exception):  # noqa: N818 — becomes a sentence, and is never shown as an error
    """A model has parts that cannot be initialised again; says which and why."""


def reset_copy(model: nn.Module, place: torch.device) -> tuple[nn.Module, str]:
    """A deep copy, reset: every module by its `reset_parameters()` or `_reset_parameters()`, children first.

    Then by the `_init_weights` of those modules that have one: called alone, or for all modules within where it takes a
    module. What a constructor does beyond that (smaller output projections by depth, layers that start as copies of
    each other) is not repeated. No value of the model is handed on: every parameter of the copy is filled with NaN
    first, and one that holds NaN afterwards has no way to be initialised; only where all of its entries are the same in
    the model (a scale of 1, a bias of 0) is it taken to be where it started, and kept.

    Draws from the global generator of one device.

    Args:
        model: any module with all of its weights in memory; nothing about it is changed.
        place: where weights are drawn.

    Returns:
        The copy, there, and how it was made.

    Raises:
        CannotReset: naming the first module that has no way.
    """
    replaced = next((module for module in model.named_modules() if "forward" in vars(module[1])), None)
    if replaced is not None:
        raise CannotReset(
            f"the forward of {_called(*replaced)} was replaced, and a copy might still call the model's own"
        )
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise CannotReset(f"{type(model).__name__} cannot be copied ({_said(error)})") from error
    if any(parameter.device != place for parameter in twin.parameters()):
        twin.to(place)  # where the random state of the model's own device is not kept
    for module in twin.modules():
        for name in HOOKS:
            hooks = getattr(module, name)
            for key in others(hooks):
                del hooks[key]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(float("nan"))
        ways = _reset(twin)
        kept = _kept(twin, model)
    how = f"a copy of {type(model).__name__} reset module by module ({', '.join(ways) or 'no module has a way'})"
    how += f", {kept} constant parameters kept" if kept else ""
    return twin, f"{how}, and nothing done of what its constructor may do beyond that"


def others(hooks: dict[int, Any]) -> list[int]:
    """Which of a module's hooks are not those of torch or transformers, which belong to the architecture."""
    return [key for key, hook in hooks.items() if _library(hook) not in ("torch", "transformers")]


def _library(hook: Any) -> str:
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]


def _reset(twin: nn.Module) -> list[str]:
    ways: dict[str, None] = {}
    order = list(_children_first(twin, "", set()))
    for name, module in order:
        called = next((way for way in _RESETS if _takes(getattr(module, way, None)) == 0), None)
        if called is not None:
            _try(getattr(module, called), name, module, called)
            ways[called] = None
    library = library_class("transformers.modeling_utils", "PreTrainedModel")
    whole = [name for name, module in order if isinstance(module, library)]
    for name, module in order:
        if any(name.startswith(f"{outer}.") or (not outer and name) for outer in whole):
            continue  # the model around it initialises it
        own: Any = getattr(module, _INITIALISES, None)
        takes = _takes(own)
        way: Callable[[], Any]
        if name in whole:
            way = partial(_initialise_weights, module)
        elif own is not None and takes in (0, 1):
            way = own if takes == 0 else partial(module.apply, own)
        else:
            continue
        _try(way, name, module, _INITIALISES)
        ways[_INITIALISES] = None
    return list(ways)


def _children_first(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    for last, child in module.named_children():
        yield from _children_first(child, f"{name}.{last}" if name else last, seen)
    yield name, module


def _takes(way: Any) -> int | None:
    """How many arguments a method must be given; None for what is no method."""
    if not callable(way):
        return None
    try:
        found = inspect.signature(way).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in found)


def _try(way: Callable[[], Any], name: str, module: nn.Module, called: str) -> None:
    try:
        way()
    except Exception as error:
        raise CannotReset(f"{called} of {_called(name, module)} failed ({_said(error)})") from error


def _initialise_weights(model: Any) -> None:
    """What a Hugging Face model does once it is built; it marks what is done, and does nothing twice."""
    for module in model.modules():
        for marked in (module, *module._parameters.values(), *module._buffers.values()):
            if marked is not None and "_is_hf_initialized" in vars(marked):
                del marked._is_hf_initialized
    model.initialize_weights()


def _kept(twin: nn.Module, model: nn.Module) -> int:
    """Give parameters that nothing has initialised the value that all of their entries have in the model.

    Returns:
        How many there were.

    Raises:
        CannotReset: naming the module of the first whose entries differ.
    """
    kept = 0
    originals = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if not bool(parameter.isnan().any()):
            continue
        original = originals[name].detach()
        if original.numel() < 2 or original.is_complex() or not bool((original == original.flatten()[0]).all()):
            path, _, last = name.rpartition(".")
            where = _called(path, twin.get_submodule(path))
            raise CannotReset(
                f"{where} holds a parameter {last!r} of its own, which no reset_parameters or _init_weights sets"
            )
        parameter.copy_(original)
        kept += 1
    return kept


def _called(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
