"""A map that a model already made, with the same interface as the one that is never stored."""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.blocks import tiles
from fullrank.operators.masks import Arbitrary, Mask, Padding, Shape, recognise
from fullrank.operators.masks.base import restrict
from fullrank.operators.products import columns_of
from fullrank.operators.scores import accumulate
from fullrank.operators.summary import Summary
from fullrank.operators.uniform import Difference, Uniform, visible_mass

__all__ = ["DenseAttention"]


class DenseAttention:
    """Attention weights seen in an eager model; its numbers are of the weights as given, rounded if in half precision.

    Attributes:
        weights: (batch, heads, queries, keys); rows need not sum to one (a sink column may have been dropped).
        logits: the masked scores they are the softmax of, where known; without them logit statistics are NaN.
        sink: the weight of the dropped sink column, (batch, heads, queries); needed only by `without_keys`.
    """

    def __init__(
        self,
        weights: Float[Tensor, "..."],
        *,
        logits: Float[Tensor, "..."] | None = None,
        visible: Mask | Bool[Tensor, "..."] | None = None,
        sink: Float[Tensor, "..."] | None = None,
    ):
        weights = weights[None] if weights.ndim == 3 else weights
        if weights.ndim != 4:
            raise ShapeError(f"weights have the shape {tuple(weights.shape)}; expected (batch, heads, queries, keys).")
        logits = logits[None] if logits is not None and logits.ndim == 3 else logits
        if logits is not None and logits.shape != weights.shape:
            raise ShapeError(f"logits {tuple(logits.shape)} and weights {tuple(weights.shape)} differ in shape.")
        self.weights, self.logits, self._visible, self.sink = weights, logits, visible, sink

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return tuple(self.weights.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in: float32, or float64 for float64 weights."""
        return accumulate(self.weights[:0]).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.device

    @cached_property
    def mask(self) -> Mask:
        """Who is visible: as given, else where a logit is above half the dtype's lowest, else where a weight is not 0.

        A weight that underflowed to 0 counts as hidden where there are no logits to tell.
        """
        if isinstance(self._visible, Mask):
            return self._visible
        if self._visible is not None:
            return recognise(self._visible)
        if self.logits is not None:
            return recognise(self.logits > torch.finfo(self.logits.dtype).min / 2)
        return recognise(self.weights > 0)

    def select(self, batch: slice, heads: slice) -> "DenseAttention":
        """The map of some sequences and heads."""
        return DenseAttention(
            self.weights[batch, heads],
            logits=None if self.logits is None else self.logits[batch, heads],
            visible=self.mask.select(batch, heads),
            sink=None if self.sink is None else restrict(self.sink, batch, heads),
        )

    def leading(self, tokens: int) -> "DenseAttention":
        """The weights among the first tokens, as they are: of rows that take from later keys, less than all."""
        sink = self.sink
        return DenseAttention(
            self.weights[:, :, :tokens, :tokens],
            logits=None if self.logits is None else self.logits[:, :, :tokens, :tokens],
            visible=self.mask.leading(tokens),
            sink=sink if sink is None or sink.shape[-1] == 1 else sink[..., :tokens],
        )

    def rows(self, queries: slice) -> Float[Tensor, "batch heads q keys"]:
        """A range of rows, in the precision of products."""
        return self.weights[:, :, queries].to(self.dtype)

    def dense(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of A."""
        return self.weights.to(self.dtype)

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A V, for V of (batch, heads or key-value heads, keys, columns)."""
        values = columns_of(self.shape, V, "V", self.dtype)
        group = self.shape[1] // values.shape[1]
        out = values.new_empty(*self.shape[:3], values.shape[3])
        for tile in tiles(self.shape):
            index = torch.arange(tile.heads.start, tile.heads.stop, device=self.device) // group
            v = values[tile.batch, tile.heads] if group == 1 else values[tile.batch].index_select(1, index)
            for rows in tile.rows:
                out[tile.batch, tile.heads, rows] = self.weights[tile.batch, tile.heads, rows].to(self.dtype) @ v
        return out if V.ndim == 4 else out[0]

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Aᵀ U, for U of (batch, heads, queries, columns)."""
        left = columns_of(self.shape, U, "U", self.dtype)
        out = left.new_zeros(*self.shape[:2], self.shape[3], left.shape[3])
        for tile in tiles(self.shape):
            for rows in tile.rows:
                at = (tile.batch, tile.heads, rows)
                out[tile.batch, tile.heads] += self.weights[at].to(self.dtype).mT @ left[at]
        return out if U.ndim == 4 else out[0]

    @torch.no_grad()
    def summary(self, *, groups: Bool[Tensor, "groups batch queries"] | None = None) -> Summary:
        """Statistics of every row and the mean row of each group of rows, by blocks."""
        batch, heads, queries, keys = self.shape
        visible = self.visible_count().expand(batch, heads, queries)
        member = self.weights.new_ones(1, batch, queries, dtype=torch.bool) if groups is None else groups
        weight = (member.to(self.device)[:, :, None] & (visible > 0)).double()
        names = ("entropy", "inverse_participation", "row_sum", "log_sum_exp", "max_logit", "logit_mean", "logit_std")
        out = {name: torch.full(visible.shape, torch.nan, dtype=torch.float64, device=self.device) for name in names}
        columns = torch.zeros(len(member), batch, heads, keys, dtype=torch.float64, device=self.device)
        for tile in tiles(self.shape):
            for rows in tile.rows:
                at = (tile.batch, tile.heads, rows)
                p = self.weights[at].to(self.dtype)
                out["entropy"][at] = -torch.xlogy(p, p).sum(-1, dtype=torch.float64)
                out["inverse_participation"][at] = p.square().sum(-1, dtype=torch.float64)
                out["row_sum"][at] = p.sum(-1, dtype=torch.float64)
                columns[:, *at[:2]] += (weight[:, *at].movedim(0, 2).to(p.dtype) @ p).movedim(2, 0)
                if self.logits is not None:
                    self._logit_rows(at, visible[at], out)
        hidden = visible == 0
        filled = {name: tensor.masked_fill_(hidden, torch.nan) for name, tensor in out.items()}
        columns /= weight.sum(-1)[..., None]  # 0/0 for a group without rows
        return Summary(**filled, visible=visible, column_mean=columns)

    def _logit_rows(self, at: tuple[slice, slice, slice], n: Tensor, out: dict[str, Tensor]) -> None:
        assert self.logits is not None
        s = self.logits[at].double()
        mask = self.mask.select(*at[:2])
        shape = (*s.shape[:2], *self.shape[2:])
        seen = mask.block(at[2], slice(0, self.shape[3]), shape, device=self.device)
        hidden = torch.zeros((), dtype=torch.bool, device=self.device) if seen is None else ~seen
        mean = s.masked_fill(hidden, 0).sum(-1) / n
        out["logit_mean"][at] = mean
        out["logit_std"][at] = ((s - mean[..., None]).masked_fill(hidden, 0).square().sum(-1) / n).sqrt()
        s = s.masked_fill(hidden, -torch.inf)
        out["max_logit"][at] = s.amax(-1)
        out["log_sum_exp"][at] = s.logsumexp(-1) - out["row_sum"][at].log()

    def visible_count(self) -> Int[Tensor, "#batch #heads queries"]:
        """How many keys each query sees."""
        return self.mask.visible_count(self.shape, self.device)

    def visible_mass(self, c: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead queries"]:
        """Σ of c over the keys that each query sees, for c of (…, batch, heads, keys)."""
        return visible_mass(self.mask, self.shape, c)

    def uniform(self) -> Uniform:
        """U: the row's sum over #visible."""
        row_sum = self.weights.sum(-1, dtype=torch.float64)
        return Uniform(self.mask, self.shape, dtype=self.dtype, device=self.device, row_sum=row_sum)

    def without_keys(self, hidden: Bool[Tensor, "batch heads keys"]) -> "DenseAttention":
        """The map with these keys removed, head by head, and what is left renormalised (beside the sink, if given).

        A row of which nothing is left becomes zeros and counts as seeing no key. Makes one map, in the
        precision of products.

        Args:
            hidden: True for keys to remove.

        Returns:
            The map of what is left.
        """
        kept = ~hidden.to(self.device)
        mask = self.mask & Padding(kept)
        weights = self.weights.to(self.dtype, copy=True).masked_fill_(~kept[:, :, None], 0)
        rest = weights.sum(-1, keepdim=True, dtype=torch.float64)
        empty = rest == 0
        if self.sink is not None:
            rest = rest + self.sink[..., None]
        weights /= rest.masked_fill(rest == 0, 1)
        if bool((empty[..., 0] & (mask.visible_count(self.shape, self.device) > 0)).any()):
            mask = mask & Arbitrary(~empty)
        return DenseAttention(weights, logits=self.logits, visible=mask, sink=None)

    def __sub__(self, other: Any) -> Difference:
        return Difference(self, other)
