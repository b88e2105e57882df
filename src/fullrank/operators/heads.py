"""Heads treated together: their map kept or recomputed, the queries asked for, and where spectra start from."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.attention import AttentionMap, AttentionOperator
from fullrank.operators.kept import keep, kept_bytes
from fullrank.operators.krylov import Spectrum, leading_singular_values, random_block
from fullrank.operators.linear import Centred, LinearOperator, Restricted
from fullrank.operators.permuted import permuted
from fullrank.operators.uniform import Difference

__all__ = ["HeadGroup", "asked_queries", "head_groups"]

_WIDTH = 68
"""Columns of the start of a long map: a vector of ones, 64 directions of the keys, and"""

_SPARE = 3
"""random directions, for singular vectors that the keys do not point at."""

_BLOCKS = 12
"""Blocks of basis vectors that a spectrum is expected to need, for the budget."""


class HeadGroup:
    """Some sequences and heads, their map as an operator, and the vectors to start from."""

    def __init__(
        self,
        part: AttentionMap,
        at: tuple[slice, slice],
        rows: Tensor | None,
        columns: Tensor | None,
        memory: int,
        seed: int,
    ):
        self.part, self.seed = part, seed
        asked = asked_queries(part, at, rows)
        self.count = asked.sum(-1)
        self.rows = None if bool(asked.all()) else asked
        real = None if columns is None else columns.to(part.device)[at[0] if len(columns) > 1 else slice(None), None]
        self.columns = None if real is None or bool(real.all()) else real
        size = part.shape[2] if self.columns is None else self.columns.sum(-1).expand(self.count.shape)
        self.rank = torch.minimum(self.count, torch.as_tensor(size, device=part.device)).expand(part.shape[:2])
        self.kept = keep(part) if kept_bytes(part) <= memory else None
        self.A = self._restricted(part if self.kept is None else self.kept)
        width = _width(part)
        block = width * part.shape[2] * part.shape[0] * part.shape[1] * (4 if part.dtype == torch.float32 else 8)
        self.cap = max(4, memory // block)
        self.keys = _key_directions(part, seed)
        self.outputs = self.A.matmat(self.keys)

    def _restricted(self, operator: LinearOperator) -> LinearOperator:
        if self.rows is None and self.columns is None:
            return operator
        return Restricted(operator, self.rows, self.columns)

    def _solve(self, operator: LinearOperator, k: int, start: Tensor, tolerance: float, cap: int) -> Spectrum:
        """Leading values, NaN for those that the submatrix is too small to have."""
        has = min(k, *operator.shape[-2:])
        found = leading_singular_values(
            operator, has, start=start, tolerance=tolerance, max_iterations=min(cap, self.cap), seed=self.seed
        )
        missing = torch.arange(k, device=start.device) >= self.rank[..., None]
        values, residuals = (
            torch.nn.functional.pad(x, (0, k - has)).masked_fill(missing, torch.nan)
            for x in (found.singular_values, found.residuals)
        )
        return Spectrum(values, residuals, found.iterations, found.exact)

    def leading(self, k: int, tolerance: float, cap: int) -> Spectrum:
        """Of A."""
        ones = torch.ones_like(self.outputs[..., :1])
        return self._solve(self.A, k, self._with_spare(ones, self.outputs), tolerance, cap)

    def uniform_distance(self, tolerance: float, cap: int) -> Spectrum:
        """Of A − U."""
        U = self._restricted(self.part.uniform())
        start = self._with_spare(self.outputs - U.matmat(self.keys))
        return self._solve(Difference(self.A, U), 1, start, tolerance, cap)

    def smoothing_gain(self, tolerance: float, cap: int) -> Spectrum:
        """Of (I − J) A."""
        return self._solve(Centred(self.A, self.rows), 1, self._with_spare(self.outputs), tolerance, cap)

    def null(self, tolerance: float, cap: int) -> tuple[Tensor, Tensor]:
        """s₂ of the permuted map, and whether it converged."""
        shuffled = None if self.kept is None else permuted(self.kept, self.part.mask, seed=self.seed)
        if shuffled is None:
            return self.without_null()
        self.kept = None
        ones = torch.ones_like(self.outputs[..., :1])
        found = self._solve(self._restricted(shuffled), 2, self._with_spare(ones, self.outputs), tolerance, cap)
        return found.singular_values[..., 1], found.exact

    def without_null(self) -> tuple[Tensor, Tensor]:
        """NaN, and nothing that failed to converge."""
        nothing = torch.full(self.rank.shape, torch.nan, dtype=self.part.dtype, device=self.part.device)
        return nothing, torch.ones_like(self.rank, dtype=torch.bool)

    def _with_spare(self, *blocks: Tensor) -> Tensor:
        shape = (*self.outputs.shape[:-1], _SPARE)
        start = torch.cat([*blocks, random_block(shape, self.A, self.seed)], -1)
        return start if self.rows is None else torch.where(self.rows[..., None], start, 0)


def head_groups(attention_map: AttentionMap, k: int, memory: int) -> Iterator[tuple[tuple[slice, slice], Any]]:
    """Sequences and heads that fit the budget together with their bases; one head where one is too many."""
    batch, heads, queries, _ = attention_map.shape
    if k < 1:
        raise ShapeError(f"{k} singular values were asked for; expected at least 1.")
    each = 2 * kept_bytes(attention_map) + _BLOCKS * _width(attention_map) * queries * 4
    together = max(1, memory // each)
    if together >= heads:
        step = together // heads
        for b in range(0, batch, step):
            at = slice(b, min(b + step, batch)), slice(0, heads)
            yield at, attention_map.select(*at)
    else:
        for b in range(batch):
            for h in range(0, heads, together):
                at = slice(b, b + 1), slice(h, min(h + together, heads))
                yield at, attention_map.select(*at)


def asked_queries(
    part: AttentionMap, at: tuple[slice, slice], rows: Tensor | None
) -> Bool[Tensor, "batch heads queries"]:
    """Which queries are asked for and see a key."""
    asked = (part.visible_count() > 0).expand(part.shape[:3])
    if rows is None:
        return asked
    rows = rows.to(asked.device)
    return asked & rows[at[0] if len(rows) > 1 else slice(None), None]


def _width(attention_map: AttentionMap) -> int:
    """Columns of a block: many for long maps, where products cost most; few for short ones, where the rest does."""
    return max(16, min(_WIDTH, attention_map.shape[2] // 32, 1 + _SPARE + _directions(attention_map)))


def _directions(attention_map: AttentionMap) -> int:
    return attention_map.scores.key.shape[3] if isinstance(attention_map, AttentionOperator) else 32


def _key_directions(part: AttentionMap, seed: int) -> Tensor:
    # Logits are linear in the keys, so that A K holds the directions in which outputs differ most. Of a map without
    # keys nothing is known.
    columns = _width(part) - 1 - _SPARE
    if not isinstance(part, AttentionOperator):
        return random_block((*part.shape[:2], part.shape[3], columns), part, seed + 1)
    K = part.scores.key.to(part.dtype).repeat_interleave(part.scores.group, 1)
    return K if K.shape[3] == columns else K @ random_block((K.shape[3], columns), part, seed + 1)
