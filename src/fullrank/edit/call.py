"""One attention call as an edit sees it, whatever kernel the model calls and however it lays out its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.reading import visible_in
from fullrank.edit.places import Place
from fullrank.errors import EditError

__all__ = ["Call"]


@dataclass(frozen=True, eq=False)
class Call:
    """One call: softmax(scale · QKᵀ + bias, where visible) V, by head.

    A fused kernel shows Q, K and V before their heads are repeated, and no scores. A model that softmaxes itself shows
    its scores, its map and V, and no Q and K. Immutable; `change` makes another one.

    Of several edits of a call, `before` of the first made runs first, on what the model made, that of the next on what
    came of it, and `after` of the first made runs last. Every `after` sees the call as it was made in the end; only
    what an edit cut off the output again is missing in `value`.

    Attributes:
        place: stack, layer, part and path of the call.
        kernel: what the model calls: `scaled_dot_product_attention`, a key of a dispatch table, or `softmax`.
        value: (batch, key-value heads, keys, width of values).
        query: (batch, heads, queries, width), or None.
        key: (batch, key-value heads, keys, width), or None.
        logits: (batch, heads, queries, keys), masked scores before the softmax, or None.
        weights: (batch, heads, queries, keys), the map; to set it replaces the map, for fused kernels too.
        replaced: whether `weights` is a map that an edit put in, where all edits have made the call.
        mask: as the kernel got it, in four dimensions that broadcast: True where visible, or added to the scores.
        causal: the kernel's own flag: beside `mask`, no query sees a later key (counted from the first of both).
        window: how many keys up to its own a query sees, where the kernel is told in place of a mask. Stays as it is.
        bias: added to the scores beside `mask`; broadcasts to (batch, heads, queries, keys).
        scale: of the scores; None for 1/√width.
        softcap: c, where the kernel makes c·tanh(s/c) of the scores s; stays as it is.
        sink: logits, one per head, of a key without a value that the kernel adds; stay as they are.
        dropout: with what probability the kernel drops entries of the map, in this call; stays as it is.
        remade: `scores → map`, where the model softmaxes by itself: what its softmax makes of other scores of the form
            of `logits`, without dropout. None where the map was put in, and where a sink takes part: models may shift
            each row before, and how far such a sink is from other scores is not known.
        attend: `call → output`, (batch, heads, queries, width of values): what computes the output in the kernel's
            place, where Q and K are shown. It is called with the call as all edits have made it; one edit can set it.
        output: (batch, heads, queries, width of values), what came of the call, before any `after` changed it; None
            before.
        input: (sequences, tokens, width), what the calling module was given, as gates read it; None where it is given
            no such tensor.
    """

    place: Place
    kernel: str
    value: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    dropout: float = 0.0
    remade: Callable[[Tensor], Tensor] | None = None
    attend: Callable[[Call], Tensor] | None = None
    output: Tensor | None = None
    input: Tensor | None = None
    replaced: bool = False

    def change(self, **changes: Any) -> Call:
        """The same call with other tensors."""
        return dataclasses.replace(self, **changes)

    @property
    def queries(self) -> int:
        """Number of queries."""
        rows = self.query if self.query is not None else self.logits
        assert rows is not None
        return rows.shape[-2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.value.shape[-2]

    def visible(self) -> Tensor | None:
        """Which keys each query sees: bool, broadcasts to (batch, heads, queries, keys); None where all see all.

        Returns:
            True where visible.

        Raises:
            EditError: where the mask of the kernel is code.
        """
        if self.logits is not None:
            return visible_in(self.logits)
        seen: Tensor | None = None
        if self.mask is not None:
            if not isinstance(self.mask, Tensor):
                raise EditError(f"which keys are visible in {self.place.path} is not known: its mask is code.")
            seen = self.mask if self.mask.dtype == torch.bool else visible_in(self.mask)
        if self.causal or self.window is not None:
            ones = torch.ones(self.queries, self.keys, dtype=torch.bool, device=self.value.device)
            band = ones.tril() if self.causal else ones
            if self.window is not None:
                band = band & ones.triu(1 - self.window)
            seen = band[None, None] if seen is None else seen & band
        return seen

    def additive(self) -> Tensor | None:
        """Mask, causality and bias in one tensor: bool where that is enough, else added to the scores."""
        mask, bias = self.mask, self.bias
        if self.causal and (mask is not None or bias is not None):
            lower = torch.ones(self.queries, self.keys, dtype=torch.bool, device=self.value.device).tril()
            if mask is None:
                mask = lower[None, None]
            else:
                mask = mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, float("-inf"))
        if bias is None:
            return mask
        bias = bias.to(self.value.dtype)
        if mask is None:
            return bias
        if mask.dtype != torch.bool:
            return bias + mask
        return torch.where(mask, bias, float("-inf"))

    def product(self) -> Tensor:
        """What `attend` computes, or the map that was put in times the values, of which several heads may share one."""
        if self.attend is not None:
            return self.attend(self)
        assert self.weights is not None
        value = self.value
        groups = self.weights.shape[1] // value.shape[1]
        if groups > 1:
            value = value.repeat_interleave(groups, 1)
        return self.weights.to(value.dtype) @ value

    def changed_mask(self, before: Call) -> bool:
        """Whether what is visible or added differs from that of another call."""
        return self.mask is not before.mask or self.bias is not before.bias or self.causal != before.causal
