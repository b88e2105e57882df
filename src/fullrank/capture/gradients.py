"""Hooks on the live tensors of a forward: what a backward brings to the stream and to attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.capture.anatomy import Stack
from fullrank.capture.calls import KernelCall, shapes_only
from fullrank.capture.events import Event, GradientState
from fullrank.capture.live import Live
from fullrank.capture.reading import Unreadable, folded, shape_of

__all__ = ["End", "GradientWatch"]

_STOPPED = (
    "it was computed without gradients (reentrant activation checkpointing, or torch.no_grad inside of the model)"
)
_UNRELATED = "it does not depend on anything that gradients can flow to"


@dataclass(frozen=True, eq=False)
class End:
    """The last state of a stack in the forward that has just run, with its history.

    Attributes:
        stack: the stack.
        value: as the block returned it.
        real: (sequences, tokens) bool; None when all tokens are real.
        version: of the tensor when it was returned: an overwritten one has a later one.
        into: whether the last state of another stack was computed from this stack's stream.
    """

    stack: Stack
    value: Tensor
    real: Tensor | None
    version: int
    into: bool = False


@dataclass(eq=False)
class _Hook:
    """A tensor hook: what it will tell, and how often it was called."""

    event: GradientState
    handle: Any = None
    count: int = 0


class GradientWatch:
    """Puts tensor hooks on states and on tensors of attention calls, and takes them off again.

    A tensor hook adds nothing to the graph and is called once in every backward, before anything is clipped or
    accumulated. It holds no tensor of the forward but the mask of real tokens.

    Args:
        emit: takes the events.

    Attributes:
        starts: the first states of the stacks in the forward that has just run.
        faults: what observers raised inside of a backward.
        unreached: the reason given for what no gradient reaches.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.starts: list[Tensor] = []
        self.faults: list[Exception] = []
        self.unreached = "no gradient reached it"
        self._emit = emit
        self._hooks: list[_Hook] = []
        self._woken: list[Tensor] = []

    def begin(self) -> None:
        """A forward begins: hooks on tensors that are gone need not be remembered."""
        gone = [hook for hook in self._hooks if hook.handle.hooks_dict_ref() is None]
        self._hooks = [hook for hook in self._hooks if hook.handle.hooks_dict_ref() is not None]
        self._report_unreached(gone)
        self._sleep()

    def close(self) -> None:
        """Take off every hook; what no gradient has reached by now is told as such."""
        for hook in self._hooks:
            hook.handle.remove()
        hooks, self._hooks = self._hooks, []
        self._report_unreached(hooks)
        self._sleep()

    def wake(self, stream: Tensor) -> None:
        """Let gradients flow to the first state of a stack, also where nothing before it is trained."""
        if not torch.is_grad_enabled() or stream.is_inference():
            return
        if not stream.requires_grad:
            stream.requires_grad_()
            self._woken.append(stream)
        self.starts.append(stream)

    def state(self, event: GradientState, tensor: Tensor, arrange: Callable[[Tensor], Tensor]) -> None:
        """Watch a state of the stream.

        Args:
            event: the event to come, without its value.
            tensor: the live state.
            arrange: brings a gradient of it into (sequences, tokens, width).
        """
        if not tensor.requires_grad:
            self._emit(replace(event, reason=_UNRELATED if torch.is_grad_enabled() else _STOPPED))
            return
        self._hook(event, tensor, arrange)

    def attention(
        self,
        event: GradientState,
        call: KernelCall,
        batch: int,
        heads: int | None,
        real_keys: Tensor | None,
        *,
        enabled: bool,
    ) -> None:
        """Watch what an attention call was given and gave.

        Args:
            event: the event to come, without its value; its real tokens are those of the queries.
            call: with its live tensors.
            batch: sequences in the stream around it.
            heads: of the module that called.
            real_keys: (sequences, keys) bool; None when all are real.
            enabled: whether the block runs with gradients.
        """
        live = call.live or Live(reason="the tensors it was called with are not known")
        shape = shape_of(call, batch, heads)
        template = shapes_only(call)
        of: tuple[tuple[Literal["q", "k", "v", "output"], str, int], ...]
        of = (
            ("q", "query", shape[2]),
            ("k", "key", shape[3]),
            ("v", "value", shape[3]),
            ("output", "output", shape[2]),
        )
        for which, name, tokens in of:
            wire = getattr(live, name)
            made = replace(event, which=which, real=real_keys if which in ("k", "v") else event.real)
            if wire is None:
                self._emit(replace(made, reason=live.reason))
                continue
            if not wire.tensor.requires_grad:
                self._emit(replace(made, reason=_UNRELATED if enabled else _STOPPED))
                continue
            arrange = partial(_fold, wire.arrange, template, batch, heads)
            meta = torch.empty_strided(wire.tensor.shape, wire.tensor.stride(), device="meta", dtype=wire.tensor.dtype)
            try:
                found = tuple(arrange(meta).shape)
            except (RuntimeError, Unreadable):
                found = ()
            if len(found) != 4 or (found[0], found[2]) != (shape[0], tokens):
                shared = len(found) == 4 and found[0] == 1
                reason = "it is shared by all sequences" if shared else "its axes could not be told apart"
                self._emit(replace(made, reason=reason))
                continue
            self._hook(made, wire.tensor, arrange)

    def _hook(self, event: GradientState, tensor: Tensor, arrange: Callable[[Tensor], Tensor]) -> None:
        hook = _Hook(event)

        def see(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            try:
                with torch.no_grad():
                    self._emit(replace(event, value=arrange(gradient.detach()), backward=hook.count))
            except Exception as fault:
                self.faults.append(fault)  # told apart from what the model's own backward may raise
                raise
            hook.count += 1

        hook.handle = tensor.register_hook(see)
        self._hooks.append(hook)

    def _report_unreached(self, hooks: list[_Hook]) -> None:
        for hook in hooks:
            if not hook.count:
                self._emit(replace(hook.event, reason=self.unreached))

    def _sleep(self) -> None:
        for stream in self._woken:
            stream.requires_grad_(False)
        self._woken.clear()
        self.starts.clear()


def _fold(
    arrange: Callable[[Tensor], Tensor], template: KernelCall, batch: int, heads: int | None, gradient: Tensor
) -> Tensor:
    return folded(arrange(gradient), template, batch, heads)
