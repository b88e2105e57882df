"""U applied to anything that tokens have: means over what each query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.capture.reading import visible_in
from fullrank.edit import Call

__all__ = ["Visible", "visible_mean", "visible_of"]


@dataclass(frozen=True, eq=False)
class Visible:
    """Which keys each query sees, as the call says it: by flags, by a row that all queries share, or by a whole mask.

    Attributes:
        queries: how many.
        keys: how many.
        mask: True where visible, (batch or 1, heads or 1, queries or 1, keys); None where flags say all.
        causal: whether beside it no query sees a later key, counted from the first of both.
        window: how many keys up to its own a query sees at most; None for all.
    """

    queries: int
    keys: int
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None

    def mean(self, X: Tensor) -> Tensor:
        """U X with U_ts = 1/#visible(t) where t sees s.

        O(T) where all queries share a row of the mask, causal and windowed included: by running sums, within blocks of
        the window's length where there is one, so that no difference of long sums is taken. A mask with a row for every
        query costs one product, O(T²). Sums are in float32 at least, of bfloat16 by a product that accumulates in it;
        under autocast too, where the product of values in float32 is then one in float32.

        Args:
            X: (batch, heads, keys, width); with a mask that differs between heads, one of its heads for each of X's.

        Returns:
            (batch, heads, queries, width), or (…, 1, width) where all queries see the same. In X's type; 0 where a
            query sees nothing.
        """
        if self.mask is not None and self.mask.shape[-2] > 1:
            with torch.autocast(X.device.type, enabled=False):
                return self._product(X, self.mask)
        V = X.to(torch.promote_types(X.dtype, torch.float32))
        if self.mask is None and not self.causal and self.window is None:
            return V.mean(-2, keepdim=True).to(X.dtype)
        if self.mask is None:
            return self._sums(V).div_(self._count(V)).to(X.dtype)
        real = self.mask.mT  # (batch or 1, heads or 1, keys, 1)
        sums, count = self._sums(torch.where(real, V, 0)), self._sums(real.to(V.dtype))
        return sums.div_(count.clamp(min=1)).to(X.dtype)

    def _product(self, X: Tensor, mask: Tensor) -> Tensor:
        # not normalised: 0 and 1 are exact in any precision in which products are taken
        V = X if X.dtype == torch.bfloat16 else X.to(torch.promote_types(X.dtype, torch.float32))
        U = self._band(mask).to(V.dtype)
        count = U.sum(-1, keepdim=True, dtype=torch.promote_types(X.dtype, torch.float32)).clamp(min=1)
        if U.shape[1] > 1:
            return (U @ V).div(count).to(X.dtype)
        flat = V.transpose(1, 2).flatten(2)  # one product for all heads
        sums = (U[:, 0] @ flat).div(count[:, 0])
        means: Tensor = sums.unflatten(2, (V.shape[1], V.shape[3])).transpose(1, 2).to(X.dtype)
        return means

    def _band(self, mask: Tensor) -> Tensor:
        if self.causal:
            mask = mask & torch.ones(self.queries, self.keys, dtype=torch.bool, device=mask.device).tril()
        if self.window is not None:
            ones = torch.ones(self.queries, self.keys, dtype=torch.bool, device=mask.device)
            mask = mask & ones.triu(1 - self.window)
        return mask

    def _sums(self, V: Tensor) -> Tensor:
        """Σ over [t − window + 1, t], or over all from its start on where it is not causal."""
        if not self.causal and self.window is None:
            return V.sum(-2, keepdim=True)
        if not self.causal:
            assert self.window is not None
            tails = _running(V.flip(-2)).flip(-2)  # Σ_{s ≥ t}
            whole = tails[..., :1, :].expand(*tails.shape[:-2], self.window - 1, -1)
            return _rows(torch.cat([whole, tails], -2), self.queries)
        if self.window is None or self.window >= max(self.queries, self.keys):
            sums = _running(V)
            if self.queries > self.keys:
                last = sums[..., -1:, :].expand(*sums.shape[:-2], self.queries - self.keys, -1)
                sums = torch.cat([sums, last], -2)
            return sums[..., : self.queries, :]
        # the window of t is the beginning of its block up to t, and what follows t's place in the block before
        length = -(-max(self.queries, self.keys) // self.window) * self.window
        blocks = functional.pad(V, (0, 0, 0, length - self.keys)).unflatten(-2, (-1, self.window))
        begun = blocks.cumsum(-2)
        rest = begun[..., -1:, :] - begun
        before = functional.pad(rest[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
        windowed: Tensor = (begun + before).flatten(-3, -2)[..., : self.queries, :]
        return windowed

    def _count(self, V: Tensor) -> Tensor:
        t = torch.arange(self.queries, device=V.device)
        stop = (t + 1).clamp(max=self.keys) if self.causal else torch.full_like(t, self.keys)
        first = torch.zeros_like(t) if self.window is None else (t + 1 - self.window).clamp(min=0)
        return (stop - first).clamp(min=1).to(V.dtype)[:, None]


def visible_of(call: Call) -> Visible:
    """What a call says of who sees whom.

    Args:
        call: as it was made.

    Returns:
        It; nothing that is in the mask is looked at, so that the answer is the same for all batches of one shape.

    Raises:
        EditError: where the mask of the kernel is code.
    """
    if call.logits is not None:
        return Visible(call.queries, call.keys, visible_in(call.logits))
    if call.mask is None:
        return Visible(call.queries, call.keys, None, call.causal, call.window)
    mask: Any = call.mask
    if not isinstance(mask, Tensor):
        call.visible()  # says so
    if mask.shape[-2] > 1 and mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    mask = mask if mask.dtype == torch.bool else visible_in(mask)
    return Visible(call.queries, call.keys, mask.expand(*mask.shape[:-1], call.keys), call.causal, call.window)


def visible_mean(call: Call) -> Tensor:
    """UV: the mean of the values over the keys that each query sees, for every head.

    Args:
        call: as it was made.

    Returns:
        (batch, heads, queries, width of values); broadcasts over queries where all see the same. 0 where nothing is
        visible.
    """
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    visible, value = visible_of(call), call.value
    groups = rows.shape[1] // value.shape[1]
    if groups == 1:
        return visible.mean(value)
    if visible.mask is not None and visible.mask.shape[1] > 1:
        return visible.mean(value.repeat_interleave(groups, 1))
    return visible.mean(value).repeat_interleave(groups, 1)


def _rows(sums: Tensor, queries: int) -> Tensor:
    """The first rows; 0 for queries that begin to see after the last key."""
    return functional.pad(sums, (0, 0, 0, max(0, queries - sums.shape[-2])))[..., :queries, :]


def _running(V: Tensor) -> Tensor:
    return V.cumsum(-2)
