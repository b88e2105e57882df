"""One torch function mode that sees every attention call of a forward and disturbs none of them."""

from __future__ import annotations

import types as python_types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import overrides
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fullrank.capture.calls import KernelCall, from_sdpa
from fullrank.capture.factors import Factors
from fullrank.capture.lineage import Lineage
from fullrank.capture.live import live_of_sdpa, wires_of_reader
from fullrank.capture.marks import Marks
from fullrank.capture.reading import Unreadable
from fullrank.capture.register import Reader, reader_of
from fullrank.capture.residual import ResidualTrace
from fullrank.capture.softmax import SoftmaxTrace
from fullrank.capture.tensors import tensors_in

__all__ = ["Tap", "heads_of", "recomputing", "without_dispatch"]

_FLEX = "flex_attention"


class Tap(TorchFunctionMode):
    """Hands on every attention call and follows what the tensors in between were computed from.

    The model's own function runs, once, with the arguments it was given; nothing is drawn from the random state. While
    a function runs the mode is off, so that nothing is seen twice; `F.multi_head_attention_forward`, which is Python
    code with attention inside it, is looked into.

    Args:
        on_call: takes each call.
        on_unread: takes a sentence about a call that was seen and cannot be read.
    """

    def __init__(self, on_call: Callable[[KernelCall], None], on_unread: Callable[[str], None]) -> None:
        super().__init__()
        self.marks = Marks()
        self.softmaxes = SoftmaxTrace()
        self.factors: Factors | None = None  # where gradients are wanted
        self.lineage: Lineage | None = None  # where the roles of weights are wanted
        self.traces: list[ResidualTrace] = []  # of the blocks that are running, outermost first
        self.busy = False
        self.stance: AbstractContextManager[None] | None = None
        self._on_call = on_call
        self._on_unread = on_unread
        self._collected: list[KernelCall] | None = None
        self._heads: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function and look at what came of it."""
        kwargs = kwargs or {}
        if self.busy or torch.compiler.is_compiling() or recomputing():
            return func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._look_into(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        for trace in self.traces:
            trace.overwrites(name, args)
        with self.collecting() if reader_of(func) is not None else nullcontext():  # a kernel is one call
            output = func(*args, **kwargs)
        self._see(func, name, args, kwargs, output)
        return output

    @contextmanager
    def collecting(self) -> Iterator[list[KernelCall]]:
        """Inside, calls are gathered instead of handed on: a dispatched function is one call, whatever it calls."""
        before, self._collected = self._collected, []
        try:
            yield self._collected
        finally:
            self._collected = before

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, functions run unseen."""
        before, self.busy = self.busy, True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.busy = before

    def hand_on(self, call: KernelCall) -> None:
        """Count a call and give it to whoever listens."""
        if self._collected is not None:
            self._collected.append(call)
            return
        for trace in self.traces:
            trace.attention += 1
        with self.silent(), torch.no_grad():
            self._on_call(call)

    def ask(self, reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> KernelCall | None:
        """What a user's reader makes of a call; the sources of its values are filled in."""
        with self.silent(), torch.no_grad():
            call = reader(args, kwargs, output)
            if call is not None and self.factors is not None and call.live is None:
                given = (*tensors_in(args), *tensors_in(kwargs))
                call = replace(call, live=wires_of_reader(call.query, call.key, call.value, given, tensors_in(output)))
        if call is None or call.sources:
            return call
        sources = self.marks.of(call.value) or self.marks.of(call.key)
        if not sources:  # the reader handed on views
            for tensor in (*tensors_in(args), *tensors_in(kwargs)):
                sources |= self.marks.of(tensor)
        return replace(call, sources=sources)

    def read(
        self, reader: Reader, called: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> KernelCall | None:
        """As `ask`; what a reader cannot read is said."""
        try:
            return self.ask(reader, args, kwargs, output)
        except Unreadable as reason:
            self.unread(f"{called} was not read: {reason}.")
            return None

    def unread(self, sentence: str) -> None:
        """Count a call that cannot be read, and say so."""
        for trace in self.traces:
            trace.attention += 1
        self._on_unread(sentence)

    def _see(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        reader = reader_of(func)
        call = None
        if self.lineage is not None:
            self.lineage.see(func, name, args, kwargs, output)
        if func is functional.scaled_dot_product_attention:
            value = args[2] if len(args) > 2 else kwargs["value"]
            call = from_sdpa(output, self.marks.of(value), self._heads, args, kwargs)
            if self.factors is not None:
                call = replace(call, live=live_of_sdpa(output, args, kwargs))
        elif reader is not None:
            call = self.read(reader, f"a call of {name}", args, kwargs, output)
        elif name == _FLEX:
            self.unread("attention through a flex_attention kernel was not observed: its mask and scores are code.")
        else:
            call = self.softmaxes.see(name, args, kwargs, output, self.marks, self._heads)
            if self.factors is not None:
                if call is not None:
                    call = replace(call, live=self.factors.complete(call, name, args, kwargs, output))
                else:
                    self.factors.see(name, args, kwargs, output, self.marks)
        if call is not None:
            if self.lineage is not None:
                self.lineage.see_attention()
            self.hand_on(call)
        self.marks.follow(args, kwargs, output)
        for trace in self.traces:
            trace.see(name, args, output)

    def _look_into(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        heads = kwargs.get("num_heads", args[4] if len(args) > 4 else None)
        before, self._heads = self._heads, heads
        try:
            with self:
                if hasattr(overrides, "redispatch_function"):
                    return overrides.redispatch_function(func, types, args, kwargs)
                return without_dispatch(func)(*args, **kwargs)
        finally:
            self._heads = before


def recomputing() -> bool:
    """Whether a backward pass is running in this thread: activation checkpointing calls modules again inside it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _no_mode(tensors: Any) -> bool:
    return False


def without_dispatch(func: Any) -> Any:
    """The same code without its first question, whether a mode wants to see the call: to look into it, once."""
    names = func.__globals__ | {"has_torch_function": _no_mode}
    copy = python_types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def heads_of(module: torch.nn.Module | None) -> int | None:
    """The number of heads that an attention module states, under the names in use."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"):
        found = getattr(module, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
