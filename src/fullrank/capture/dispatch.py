"""Attention of Hugging Face models: an override under the same key of their dispatch table."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn, overrides

from fullrank.capture.calls import KernelCall
from fullrank.capture.flash import read_dispatched
from fullrank.capture.functions import watching
from fullrank.capture.live import Live, Wire
from fullrank.capture.register import reader_of
from fullrank.capture.tap import Tap

__all__ = ["LOCK", "overriding"]


@contextmanager
def overriding(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Inside, attention functions that this model's modules get from a dispatch table report to the tap.

    The function under each key in use is replaced by one that calls it: under a new name the model would lose its
    mask. The tables are process-wide, so calls of other models' modules pass through. Entries found in a table's
    local map are put back, others deleted.

    Args:
        model: the model that is looked at.
        tap: takes the calls.

    Yields:
        Nothing.
    """
    watcher = _Watcher(tap, {id(module) for module in model.modules()})
    with ExitStack() as put_back:
        put_back.enter_context(watching(model, tap))
        for table in _tables(model):
            for key in _keys(model):
                if key in table:
                    put_back.callback(_leave, table._local_mapping, key, _enter(table, key, watcher), watcher)
        yield


@dataclass(eq=False)
class _Watcher:
    """Who wants to see the calls of a model's modules."""

    tap: Tap
    mine: set[int]


@dataclass(eq=False)
class _Probe:
    """Stands in a table in place of a function, for all who watch."""

    function: Callable[..., Any]
    key: str
    before: Any  # what the table held of its own under the key
    watchers: list[_Watcher] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("module", "query", "key", "value"), args, strict=False)) | kwargs
        run = self.function
        for watcher in self.watchers:
            if id(given.get("module")) in watcher.mine:
                run = functools.partial(_seen, self.function, self.key, watcher.tap, run)
        return run(*args, **kwargs)


LOCK = threading.RLock()
"""Held while a dispatch table is written: tables are shared by all threads, observers and edits."""


def _enter(table: Any, key: str, watcher: _Watcher) -> _Probe:
    with LOCK:
        held: Any = None
        found: Any = table[key]
        while hasattr(found, "leases"):  # an edit rewrites the call: it is seen as it is made
            held, found = found, found.function
        probe = found if isinstance(found, _Probe) else _Probe(found, key, table._local_mapping.get(key))
        probe.watchers.append(watcher)
        if held is not None:
            held.function = probe
        else:
            table._local_mapping[key] = probe
        return probe


def _leave(local: dict[str, Any], key: str, probe: _Probe, watcher: _Watcher) -> None:
    with LOCK:
        probe.watchers.remove(watcher)
        if probe.watchers:
            return
        found: Any = local.get(key)
        if found is probe:
            if probe.before is None:
                del local[key]
            else:
                local[key] = probe.before
        while hasattr(found, "leases"):  # edits from before, and those that were made meanwhile and stay
            if found.function is probe:
                found.function = probe.function
            if found.before is probe:
                found.before = probe.before
            found = found.function


def _tables(model: nn.Module) -> list[Any]:
    """Dispatch tables that the model's own source files use: they may have one each."""
    if "transformers" not in sys.modules:
        return []
    tables: dict[int, Any] = {}
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        source = sys.modules.get(kind.__module__)
        table = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
        if table is not None and isinstance(getattr(table, "_local_mapping", None), dict):
            tables[id(table)] = table
    return list(tables.values())


def _keys(model: nn.Module) -> set[str]:
    found = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()}
    return {key for key in found if isinstance(key, str) and key != "eager"}


def _seen(
    function: Callable[..., Any],
    key: str,
    tap: Tap,
    run: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # `function` is what stood in the table; `run` may be what reports its calls to somebody else
    if tap.busy or torch.compiler.is_compiling():
        return run(*args, **kwargs)
    given = dict(zip(("module", "query", "key", "value"), args, strict=False)) | kwargs
    if key == "flex_attention":
        with _unseen(tap):
            output = run(*args, **kwargs)
        tap.unread("attention through flex_attention was not observed: its mask and scores are code, not tensors.")
        return output
    reader = reader_of(function) or (read_dispatched if _is_flash(function, key) else None)
    with tap.collecting() as inner:
        output = run(*args, **kwargs)
    if reader is not None:
        call = tap.read(reader, f"attention through {key!r}", args, kwargs, output)
        if call is not None:
            if tap.lineage is not None:
                tap.lineage.see(function, key, (given["query"], given["key"], given["value"]), {}, output)
                tap.lineage.see_attention()
            tap.hand_on(call)
    elif len(inner) == 1:
        tap.hand_on(_whole(inner[0], given["query"], given["key"], given["value"]))
    else:
        tap.unread(
            f"attention through {key!r} was not observed: its kernel is not known; use "
            "attn_implementation='sdpa' or fullrank.capture.register_attention."
        )
    tap.marks.follow((given["query"], given["key"], given["value"]), {}, output)
    return output


def _is_flash(function: Callable[..., Any], key: str) -> bool:
    """Whether a dispatched function takes what flash attention takes: also a kernel from a hub under its own key."""
    while isinstance(function, functools.partial):
        function = function.func
    return key.startswith("flash_attention") or getattr(function, "__name__", "") == "flash_attention_forward"


@contextmanager
def _unseen(tap: Tap) -> Iterator[None]:
    """A compiled kernel stays compiled: it must meet neither the mode nor the stance that keeps the compiler away."""
    on_top = overrides._get_current_function_mode() is tap
    with overrides._pop_mode_temporarily() if on_top else nullcontext():
        if tap.stance is None:
            yield
            return
        tap.stance.__exit__(None, None, None)
        try:
            yield
        finally:
            tap.stance.__enter__()


def _whole(inner: KernelCall, query: Tensor, key: Tensor, value: Tensor) -> KernelCall:
    """The kernel's call with the keys and values as they were before their heads were repeated or packed."""
    # mask and scale are read from the kernel's call, not from the dispatched one: they are what was computed with
    if inner.query is None or inner.key is None or inner.value is None or query.ndim != 4:
        return inner
    given = (query, key, value)
    query, key, value = (tensor.detach().to(inner.dtype) for tensor in given)
    keys = inner.key.shape[-2]
    mask = inner.mask
    if inner.query.shape != query.shape:
        # one decoding step with grouped heads: the kernel's token axis holds the heads of a group
        heads = query.shape[1]
        if query.shape[2] != 1 or inner.query.shape[1] * inner.query.shape[2] != heads:
            return inner
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], heads, 1, mask.shape[-1])
    if key.shape[2] < keys or key.shape[1] > inner.key.shape[1]:
        live = _live_whole(inner.live, given[0], None, None, keys)
        return replace(inner, query=query, mask=mask, live=live)  # a paged cache supplied the keys
    live = _live_whole(inner.live, *given, keys)
    return replace(inner, query=query, key=key[:, :, :keys], value=value[:, :, :keys], mask=mask, live=live)


def _live_whole(inner: Live | None, query: Tensor, key: Tensor | None, value: Tensor | None, keys: int) -> Live | None:
    """The tensors that the dispatched function was given, instead of those that its kernel was."""
    if inner is None:
        return None
    output = inner.output
    if output is not None and output.tensor.shape[:-1] != query.shape[:-1]:  # heads of a group on the token axis
        lead = query.shape[:-1]
        output = Wire(output.tensor, lambda gradient: gradient.reshape(*lead, gradient.shape[-1]))
    if key is None or value is None:
        return replace(inner, query=Wire(query), output=output)
    of_key, of_value = (Wire(tensor, lambda gradient: gradient[:, :, :keys]) for tensor in (key, value))
    return Live(Wire(query), of_key, of_value, output)
