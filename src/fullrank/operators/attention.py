"""Attention as a linear map over tokens: what every such map can do, and the one that is never stored."""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.masks import Full, Mask, Padding, Shape
from fullrank.operators.products import apply, apply_transposed, probabilities
from fullrank.operators.scores import Bias, Scores
from fullrank.operators.streaming import summarise
from fullrank.operators.summary import Summary
from fullrank.operators.uniform import Difference, Uniform, visible_mass

__all__ = ["AttentionMap", "AttentionOperator"]


@runtime_checkable
class AttentionMap(Protocol):
    """A batch of (queries × keys) matrices A, one per sequence and head, rows non-negative with sum ≤ 1.

    A query that sees no key has a row of zeros. Products accept three dimensions for a single sequence, and values or
    results of key-value heads where heads share them.
    """

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in: float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Where the map lives."""

    @property
    def mask(self) -> Mask:
        """Who is visible to whom."""

    def select(self, batch: slice, heads: slice) -> "AttentionMap":
        """The map of some sequences and heads."""

    def leading(self, tokens: int) -> "AttentionMap":
        """What the first queries take from the first keys: of a causal map, all that these queries take."""

    def rows(self, queries: slice) -> Float[Tensor, "batch heads q keys"]:
        """A range of rows of A, materialised."""

    def dense(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of A, for small maps and tests."""

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A V, for V of (batch, heads or key-value heads, keys, columns)."""

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Aᵀ U, for U of (batch, heads, queries, columns)."""

    def summary(self, *, groups: Bool[Tensor, "groups batch queries"] | None = None) -> Summary:
        """Statistics of every row and mean rows, in one pass."""

    def visible_count(self) -> Int[Tensor, "#batch #heads queries"]:
        """How many keys each query sees."""

    def visible_mass(self, c: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead queries"]:
        """Σ of c over the keys that each query sees."""

    def uniform(self) -> Any:
        """U: what the same rows would be if they did not select, 1/#visible (times the row's sum)."""

    def without_keys(self, hidden: Bool[Tensor, "batch heads keys"]) -> "AttentionMap":
        """The map with these keys removed, head by head, and its rows renormalised."""

    def __sub__(self, other: Any) -> Any:
        """The difference of two maps, as an operator."""


class AttentionOperator:
    """A = softmax(scores), never stored: products, summary and U.

    `AttentionOperator(scores)`, or `AttentionOperator(query, key, scale=…, mask=…)` for short.
    """

    def __init__(
        self,
        scores: Scores | Tensor,
        key: Tensor | None = None,
        *,
        scale: float | None = None,
        mask: Mask = Full(),  # noqa: B008 - frozen
        bias: Bias | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
    ):
        if isinstance(scores, Tensor):
            if key is None:
                raise ShapeError("key is missing; pass AttentionOperator(query, key) or AttentionOperator(scores).")
            scores = Scores(scores, key, scale=scale, mask=mask, bias=bias, softcap=softcap, sink=sink)
        self.scores = scores
        self._known: tuple[Tensor, Tensor] | None = None  # log-sum-exp of rows, sums of columns
        self._row_sum: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return self.scores.shape

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in: float32, or float64 for float64 queries."""
        return self.scores.dtype

    @property
    def device(self) -> torch.device:
        """Where the query is."""
        return self.scores.device

    @property
    def mask(self) -> Mask:
        """Who is visible to whom."""
        return self.scores.mask

    def select(self, batch: slice, heads: slice) -> "AttentionOperator":
        """The map of some sequences and heads; keys are copied only where heads of two key groups are cut."""
        part = AttentionOperator(self.scores.select(batch, heads))
        if self._known is not None:
            part._known = (self._known[0][batch, heads], self._known[1][batch, heads])
        if self._row_sum is not None:
            part._row_sum = self._row_sum[batch, heads]
        return part

    def leading(self, tokens: int) -> "AttentionOperator":
        """The map of the same scores among the first tokens, softmaxed over these keys alone."""
        return AttentionOperator(self.scores.leading(tokens))

    def rows(self, queries: slice) -> Float[Tensor, "batch heads q keys"]:
        """A range of rows of A, materialised."""
        s = self.scores.block(queries, slice(0, self.shape[3]))
        return probabilities(s, self.scores.sink)

    def dense(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of A, for small maps and tests."""
        return self.rows(slice(0, self.shape[2]))

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A V, for V of (batch, heads or key heads, keys, columns)."""
        return apply(self.scores, V)

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Aᵀ U, for U of (batch, heads, queries, columns); several times faster once a summary has been taken."""
        return apply_transposed(self.scores, U, known=self._known)

    def summary(self, *, groups: Bool[Tensor, "groups batch queries"] | None = None) -> Summary:
        """Statistics of every row and the mean row of each group of rows, in one pass."""
        everything = torch.ones(1, self.shape[0], self.shape[2], dtype=torch.bool, device=self.device)
        member = everything if groups is None else torch.cat([everything, groups.to(self.device)])
        found = summarise(self.scores, member)
        mean = found.column_mean
        rows = (found.visible > 0).sum(-1)[..., None]
        self._row_sum = None if self.scores.sink is None else found.row_sum
        self._known = (found.log_sum_exp, torch.where(rows > 0, mean[0] * rows, 0))
        return found if groups is None else replace(found, column_mean=mean[1:])

    def visible_count(self) -> Int[Tensor, "#batch #heads queries"]:
        """How many keys each query sees."""
        return self.mask.visible_count(self.shape, self.device)

    def visible_mass(self, c: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead queries"]:
        """Σ of c over the keys that each query sees, for c of (…, batch, heads, keys)."""
        return visible_mass(self.mask, self.shape, c)

    def uniform(self) -> Uniform:
        """U: 1/#visible in each row, times the row's sum where there is a learned sink."""
        if self.scores.sink is not None and self._row_sum is None:
            self.summary()
        return Uniform(self.mask, self.shape, dtype=self.dtype, device=self.device, row_sum=self._row_sum)

    def without_keys(self, hidden: Bool[Tensor, "batch heads keys"]) -> "AttentionOperator":
        """The map with these keys out of the softmax, head by head."""
        return AttentionOperator(replace(self.scores, mask=self.mask & Padding(~hidden)))

    def __sub__(self, other: Any) -> Difference:
        return Difference(self, other)
