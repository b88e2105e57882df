"""What an architecture needs of the tokens of a batch: how alike they are, how large, and whom queries see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fullrank import metrics
from fullrank.capture import Anatomy, AttentionCall, Event, Recorder, Signal, Stack, StreamState
from fullrank.measure.block_parts import Untold
from fullrank.measure.positions import late_tokens, real_or_all
from fullrank.verbs.batches import Call

__all__ = ["Tokens", "look_at_tokens"]


def look_at_tokens(model: nn.Module, anatomy: Anatomy, stack: Stack, calls: Sequence[Call], few: Call) -> Tokens:
    """Run the calls as far as the first block, and one of them through all blocks.

    Args:
        model: in the state it is to be looked at.
        anatomy: what the survey found.
        stack: of these.
        calls: what the model is called with.
        few: sequences of the first call, of which is looked whom queries see.

    Returns:
        What was seen.
    """
    tokens = Tokens(stack)
    with _WithoutProducts(), Recorder(model, [tokens.of("attention")], anatomy=anatomy, real=few.real):
        few.run(model)
    for call in calls:
        with suppress(_Enough), Recorder(model, [tokens.of("stream")], anatomy=anatomy, real=call.real):
            call.run(model)
    return tokens


class _WithoutProducts(TorchFunctionMode):
    """Inside, products with weights are zeros: who sees whom does not depend on them, and they are what takes time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run anything else."""
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if func is functional.linear:
            return given[0].new_zeros(*given[0].shape[:-1], given[1].shape[0])
        if func is torch.addmm and isinstance(given[2], nn.Parameter):
            return given[1].new_zeros(given[1].shape[0], given[2].shape[1])
        return func(*args, **(kwargs or {}))


class _Enough(Exception):  # noqa: N818 - ends a forward, never shown
    """What was wanted of this forward has been seen."""


class Tokens:
    """Cosines and size of the tokens before the first block, and how far queries see."""

    def __init__(self, stack: Stack) -> None:
        self.needs: frozenset[Signal] = frozenset()
        self.count = 0
        self.reach = 0
        self._stack = stack
        self._cosines: list[Tensor] = []
        self._squares: list[Tensor] = []

    def of(self, wanted: Signal) -> Self:
        """Look at states alone, which takes no more than the start of a forward, or at attention alone."""
        self.needs = frozenset({wanted})
        return self

    def see(self, event: Event) -> None:
        """Take in the state before the first block, or what every query sees."""
        if isinstance(event, AttentionCall) and event.stack == self._stack.name:
            self.reach = max(self.reach, int(event.attention.visible_count().max()))
        if not isinstance(event, StreamState) or (event.stack, event.layer) != (self._stack.name, 0):
            return
        X = event.value
        real = real_or_all(event.real, X.shape[0], X.shape[1], X.device)
        scope = late_tokens(real) if self._stack.causal else real
        self._cosines.append(metrics.similarity(X, scope).double().cpu())
        self._squares.append(X.double().square().mean(-1)[real].cpu())
        self.count = max(self.count, X.shape[1])
        raise _Enough

    def rows(self) -> list[Any]:
        """No rows come of this."""
        return []

    def merge(self, other: Any) -> None:
        """There is nothing to merge."""

    def fields(self) -> dict[str, Any]:
        """What an architecture says of them."""
        cosines = torch.cat(self._cosines)
        cosines = cosines[cosines.isfinite()]
        if not len(cosines):
            raise Untold("no sequence of the batch has two tokens")
        stderr = float(cosines.std()) / math.sqrt(len(cosines)) if len(cosines) > 1 else 0.0
        rms = math.sqrt(float(torch.cat(self._squares).mean()))
        if not rms:
            raise Untold("the tokens before its first block are zero")
        return {"correlation": float(cosines.mean()), "correlation_stderr": stderr, "input_rms": rms}
