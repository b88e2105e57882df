"""Attention kernels that are plain Python functions: replaced, wherever they are held, while a model is looked at."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fullrank.capture import flash, xformers
from fullrank.capture.reading import Unreadable
from fullrank.capture.register import Reader, registered
from fullrank.capture.tap import Tap, recomputing

__all__ = ["watching"]

_KNOWN = flash.READERS | xformers.READERS


@contextmanager
def watching(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Inside, calls of known kernels that no torch function mode sees reach the tap.

    A function has no place of its own: whoever imports it holds it. So every loaded module and every module of the
    model is asked for the very objects, and what was replaced is put back. Packages that are not loaded are not asked.

    Args:
        model: the model that is looked at.
        tap: takes the calls.

    Yields:
        Nothing.
    """
    readers = _readers()
    if not readers:
        yield
        return
    watched = {id(function): _watched(function, reader, tap) for function, reader in readers}
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for names in _namespaces(model):
            if watched.keys().isdisjoint(map(id, list(names.values()))):
                continue
            for name, value in list(names.items()):
                if id(value) in watched:
                    held.append((names, name, value))
                    names[name] = watched[id(value)]
        yield
    finally:
        for names, name, value in reversed(held):
            if names.get(name) is watched[id(value)]:
                names[name] = value


def _readers() -> list[tuple[Callable[..., Any], Reader]]:
    found: dict[int, tuple[Callable[..., Any], Reader]] = {}
    for (package, name), reader_for in _KNOWN.items():
        function = getattr(sys.modules.get(package), name, None)
        if callable(function):
            found[id(function)] = (function, reader_for(function))
    for function, reader in registered():
        if isinstance(function, types.FunctionType) and not function.__module__.startswith("torch"):
            found[id(function)] = (function, reader)
    return list(found.values())


def _namespaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            yield names
    for part in model.modules():
        yield part.__dict__


def _watched(function: Callable[..., Any], reader: Reader, tap: Tap) -> Callable[..., Any]:
    here = threading.get_ident()

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if tap.busy or recomputing() or torch.compiler.is_compiling() or threading.get_ident() != here:
            return function(*args, **kwargs)
        with tap.collecting():
            output = function(*args, **kwargs)
        name = getattr(function, "__name__", "a kernel")
        try:
            call = tap.ask(reader, args, kwargs, output)
        except Unreadable as reason:
            tap.unread(f"a call of {name} was not read: {reason}.")
        else:
            if call is not None:
                if tap.lineage is not None:
                    tap.lineage.see(function, name, args, kwargs, output)
                    tap.lineage.see_attention()
                tap.hand_on(call)
        tap.marks.follow(args, kwargs, output)
        return output

    return watched
