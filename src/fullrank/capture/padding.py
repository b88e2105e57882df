"""Which tokens of a stack, and of a call's queries and keys, are real and not padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.calls import KernelCall
from fullrank.capture.marks import bit_of
from fullrank.capture.reading import Reading

__all__ = ["RealTokens"]


class RealTokens:
    """What was told of real tokens, and what masks show where nothing was told.

    Args:
        anatomy: the stacks.
        real: (sequences, tokens) bool, by stack or one for the stack it belongs to; None where nothing was told.
    """

    def __init__(self, anatomy: Anatomy, real: Tensor | Mapping[str, Tensor] | None) -> None:
        self._stacks = anatomy.stacks
        self._real = real

    def of(self, stack: Stack, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """(batch, tokens) bool of a stack's stream; None where all are real or nothing is known."""
        if stack.over == "samples":
            return None
        if isinstance(self._real, Mapping):
            real = self._real.get(stack.name)
        elif self._takes_tensor(stack):
            real = self._real
        else:
            real = None
        if real is None or tuple(real.shape) != (batch, tokens):
            return None
        return real.to(device=device, dtype=torch.bool)

    def of_call(
        self, call: KernelCall, reading: Reading, stack: Stack, kind: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """The real queries and the real keys of an attention call of kind `self` or `cross`."""
        if call.real is not None:
            return call.real
        batch, _, queries, keys = reading.attention.shape
        device = reading.attention.device
        of_queries = self.of(stack, batch, queries, device)
        if kind == "self":
            of_keys = self.of(stack, batch, keys, device)
        else:
            sources = [s for i, s in enumerate(self._stacks) if call.sources & bit_of(i) and s is not stack]
            found = [real for s in sources if (real := self.of(s, batch, keys, device)) is not None]
            of_keys = found[0] if found else None
        if of_keys is None:
            of_keys = reading.seen_keys()
            if of_queries is None and kind == "self" and queries == keys:
                of_queries = of_keys
        return of_queries, of_keys

    def _takes_tensor(self, stack: Stack) -> bool:
        """One mask belongs to the encoder rather than to the decoder that reads it, to text rather than to images."""
        crosses = any(part.startswith("cross") for parts in stack.calls for part in parts)
        return len(self._stacks) == 1 or not (crosses or stack.name.startswith("vision"))
