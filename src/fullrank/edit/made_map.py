"""The map of a model that softmaxes by itself, as edits change it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fullrank.edit.call import Call
from fullrank.edit.layout import KernelLayout
from fullrank.edit.softmaxes import Softmax

__all__ = ["MadeMap", "inverse"]


class MadeMap:
    """The map that meets the values, in the model's own layout.

    Args:
        softmax: that made it.
        weights: it, in (…, queries, keys).
        dtype: of the values.
        order: which axes of the model's map these are; None for as they are.
        full: what was softmaxed, in this order, with the sink's column.
        layout: of both.
    """

    def __init__(
        self,
        softmax: Softmax,
        weights: Tensor,
        dtype: torch.dtype,
        order: tuple[int, ...] | None,
        full: Tensor,
        layout: KernelLayout,
    ) -> None:
        self.weights = weights
        self._own, self._softmax, self._dtype = weights, softmax, dtype
        self._order, self._full, self._layout = order, full, layout

    def settle(self, call: Call, changed: Call) -> Call:
        """A call as the next edit sees it: with masks and biases in its scores, and the map that these give."""
        added = _added(changed) if changed.changed_mask(call) else None
        if changed.weights is not call.weights:
            assert changed.weights is not None
            self.weights = self._layout.unfold(changed.weights, self._own, "map").to(self._dtype)
        elif changed.logits is call.logits and added is None:
            return changed
        assert changed.logits is not None
        logits = changed.logits if added is None else _masked(changed.logits, added)
        changed = changed.change(logits=logits, mask=None, bias=None, causal=False)
        if changed.weights is not call.weights:
            return changed.change(remade=None)
        self.weights = self._of(logits, dropout=True)
        return changed.change(weights=self._layout.fold(self.weights))

    def remade(self, logits: Tensor) -> Tensor:
        """The map that the model's softmax makes of other scores, (batch, heads, queries, keys), without dropout."""
        return self._layout.fold(self._of(logits, dropout=False))

    def _of(self, logits: Tensor, *, dropout: bool) -> Tensor:
        full, order, keys = self._full, self._order, self._own.shape[-1]
        new = self._layout.unfold(logits, full[..., :keys], "scores")
        if keys < full.shape[-1]:  # a sink takes part in the softmax and is dropped afterwards
            new = torch.cat([new, full[..., keys:]], -1)
        if order is not None and full.ndim == len(order):
            new = new.permute(inverse(order))
        made = self._softmax.again(new.to(full.dtype), dropout=dropout)
        return made if order is None else made.permute(order)


def inverse(order: Sequence[int]) -> list[int]:
    """The order that undoes an order of axes."""
    return [order.index(axis) for axis in range(len(order))]


def _masked(logits: Tensor, added: Tensor) -> Tensor:
    if added.dtype == torch.bool:
        return logits.masked_fill(~added, torch.finfo(logits.dtype).min)
    return logits + added


def _added(call: Call) -> Tensor | None:
    """As `Call.additive`, with causality where there is nothing else."""
    added = call.additive()
    if added is None and call.causal:
        return torch.ones(call.queries, call.keys, dtype=torch.bool, device=call.value.device).tril()[None, None]
    return added
