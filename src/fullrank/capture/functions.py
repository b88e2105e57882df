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
from fullrank.capture.register import Reader, registered
from fullrank.capture.tap import Tap, recomputing

__all__ = ["watching"]

_KNOWN = flash.READERS | xformers.READERS


@contextmanager
def watching(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Inside, calls of known kernels that no torch function mode sees reach the tap.

    A function has no place of its own: whoever imports it holds it. So every loaded module and every module of the
    model is asked for the very objects, and what was replaced is put back, also where it was taken over meanwhile.
    Packages that are not loaded are not asked. Threads that look at models at the same time share the replacements; the
    last to leave puts the functions back.

    Args:
        model: the model that is looked at.
        tap: takes the calls.

    Yields:
        Nothing.
    """
    with _LOCK:
        mine = [(_replaced(function), _Watcher(tap, reader)) for function, reader in _readers()]
        for held, watcher in mine:
            held.watchers.append(watcher)
        try:
            _exchange(model, {id(held.function): held for held, _ in mine}, lambda held: held.replacement)
        except BaseException:
            _leave(model, mine)
            raise
    try:
        yield
    finally:
        with _LOCK:
            _leave(model, mine)


class _Watcher:
    """Who wants to see the calls of a function: those of one thread."""

    def __init__(self, tap: Tap, reader: Reader) -> None:
        self.tap, self.reader = tap, reader
        self.thread = threading.get_ident()

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.tap
        if tap.busy or threading.get_ident() != self.thread:
            return function(*args, **kwargs)
        with tap.collecting():
            output = function(*args, **kwargs)
        call = tap.read(self.reader, f"a call of {name}", args, kwargs, output)
        if call is not None:
            if tap.lineage is not None:
                tap.lineage.see(function, name, args, kwargs, output)
                tap.lineage.see_attention()
            tap.hand_on(call)
        tap.marks.follow(args, kwargs, output)
        return output


class _Held:
    """A function, what stands in its places, and for whom."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.watchers: list[_Watcher] = []
        self.places: list[tuple[dict[str, Any], str]] = []
        name = getattr(function, "__name__", "a kernel")

        @functools.wraps(function)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            run = function
            if not recomputing() and not torch.compiler.is_compiling():
                for watcher in self.watchers:
                    run = functools.partial(_call, watcher, run, name)
            return run(*args, **kwargs)

        self.replacement = replacement


def _call(watcher: _Watcher, run: Callable[..., Any], name: str, /, *args: Any, **kwargs: Any) -> Any:
    return watcher.call(run, name, args, kwargs)


_LOCK = threading.RLock()
_HELD: dict[int, _Held] = {}
"""By the id of the function: replaced as long as somebody watches it."""


def _replaced(function: Callable[..., Any]) -> _Held:
    return _HELD.setdefault(id(function), _Held(function))


def _leave(model: nn.Module, mine: list[tuple[_Held, _Watcher]]) -> None:
    over: dict[int, _Held] = {}
    for held, watcher in mine:
        held.watchers.remove(watcher)
        if not held.watchers:
            over[id(held.replacement)] = held
            _HELD.pop(id(held.function), None)
    for held in over.values():
        for names, name in reversed(held.places):
            if names.get(name) is held.replacement:
                names[name] = held.function
        held.places.clear()
    _exchange(model, over, lambda held: held.function)  # code may have taken a replacement for the function


def _exchange(model: nn.Module, wanted: dict[int, _Held], other: Callable[[_Held], Any]) -> None:
    """Put something else wherever one of the wanted objects is held."""
    for names in _namespaces(model) if wanted else ():
        if wanted.keys().isdisjoint(map(id, list(names.values()))):
            continue
        for name, value in list(names.items()):
            held = wanted.get(id(value))
            if held is not None:
                held.places.append((names, name))
                names[name] = other(held)


def _readers() -> list[tuple[Callable[..., Any], Reader]]:
    originals = {id(held.replacement): held.function for held in _HELD.values()}
    found: dict[int, tuple[Callable[..., Any], Reader]] = {}
    for (package, name), reader_for in _KNOWN.items():
        function = getattr(sys.modules.get(package), name, None)
        function = originals.get(id(function), function)
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
