"""Singular values of attention maps, head by head: of A, of A − U and of (I − J)A, and what they are read against.

A map that fits the memory budget is computed once and kept for all of them (several heads at a time where they are
short); beyond the budget its products are recomputed by blocks. Spectra are of the submatrix of the asked queries and
real keys: rows and columns that are out are zero, which changes no non-zero singular value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.attention import AttentionMap, AttentionOperator
from fullrank.operators.kept import keep, kept_bytes
from fullrank.operators.krylov import Spectrum, leading_singular_values, random_block
from fullrank.operators.linear import Centred, LinearOperator, Restricted
from fullrank.operators.permuted import permuted
from fullrank.operators.uniform import Difference

__all__ = ["AttentionSpectra", "attention_singular_values", "attention_spectra", "full_spectrum"]

MEMORY = 128 << 20
"""Bytes of maps kept at a time, by default: one full head of 5,700 tokens, one causal head of 8,000."""

_WIDTH = 72
"""Columns of the start of a long map: a vector of ones, 64 directions of the keys, and"""

_SPARE = 7
"""random directions, for singular vectors that the keys do not point at."""

_BLOCKS = 12
"""Blocks of basis vectors that a spectrum is expected to need, for the budget."""


@dataclass(frozen=True)
class AttentionSpectra:
    """Spectral numbers of every head.

    Attributes:
        s: leading singular values of A, in falling order; NaN where there are fewer queries or keys.
        uniform_distance: ‖A − U‖₂, 0 for attention that only averages.
        smoothing_gain: ‖(I − J)A‖₂ with J the mean over the asked queries: the largest factor by which differences
            between tokens can come out.
        null_s2: s₂ of the map with the visible entries of each row permuted; NaN where the map was not kept.
        residuals: ‖Aᵀu − σv‖ for each of `s`.
        exact: whether everything converged below the cap.
    """

    s: Float[Tensor, "batch heads leading"]
    uniform_distance: Float[Tensor, "batch heads"]
    smoothing_gain: Float[Tensor, "batch heads"]
    null_s2: Float[Tensor, "batch heads"]
    residuals: Float[Tensor, "batch heads leading"]
    exact: Bool[Tensor, "batch heads"]


@torch.no_grad()
def attention_singular_values(
    attention_map: AttentionMap,
    k: int = 2,
    *,
    rows: Bool[Tensor, "#batch queries"] | None = None,
    columns: Bool[Tensor, "#batch keys"] | None = None,
    tolerance: float = 5e-3,
    max_iterations: int = 24,
    memory: int = MEMORY,
    seed: int = 0,
) -> Spectrum:
    """The k largest singular values of every head.

    Range [0, √T]; s₁ ≥ 1 for a square row-stochastic map. Cost per head: one product of queries and keys, and three to
    nine products with at most 72 vectors.

    Args:
        attention_map: the batch of maps.
        k: how many values.
        rows: which queries; all that see a key by default.
        columns: which keys are real; all by default.
        tolerance: estimated relative growth still to come at which to stop.
        max_iterations: products at most.
        memory: bytes of maps kept at a time.
        seed: of the random directions in the start.

    Returns:
        (batch, heads, k) values and residuals, NaN where there are fewer queries or keys than values.
    """
    found = [
        (at, _Group(part, at, rows, columns, memory, seed).leading(k, tolerance, max_iterations))
        for at, part in _groups(attention_map, k, memory)
    ]
    shape = attention_map.shape[:2]
    return Spectrum(
        _assembled(shape, [(at, s.singular_values) for at, s in found]),
        _assembled(shape, [(at, s.residuals) for at, s in found]),
        max((s.iterations for _, s in found), default=0),
        _assembled(shape, [(at, s.exact) for at, s in found]),
    )


@torch.no_grad()
def attention_spectra(
    attention_map: AttentionMap,
    *,
    rows: Bool[Tensor, "#batch queries"] | None = None,
    columns: Bool[Tensor, "#batch keys"] | None = None,
    leading: int = 2,
    null: bool = True,
    tolerance: float = 5e-3,
    max_iterations: int = 24,
    memory: int = MEMORY,
    seed: int = 0,
) -> AttentionSpectra:
    """Singular values of A, ‖A − U‖₂, ‖(I − J)A‖₂ and the permuted null of every head, from one kept map per head.

    Args:
        attention_map: the batch of maps.
        rows: which queries (such as the late ones of causal attention); all that see a key by default.
        columns: which keys are real; all by default.
        leading: how many singular values of A.
        null: whether to take the permuted null, which costs about as much as the rest; NaN where not.
        tolerance: estimated relative growth still to come at which to stop.
        max_iterations: products at most, for each of the four.
        memory: bytes of maps kept at a time; beyond, products are recomputed and there is no null.
        seed: of the random directions in the start, and of the permutations.

    Returns:
        One number, or `leading` of them, per sequence and head.
    """
    found: list[tuple[tuple[slice, slice], dict[str, Tensor]]] = []
    for at, part in _groups(attention_map, leading, memory):
        group = _Group(part, at, rows, columns, memory, seed)
        how = (tolerance, max_iterations)
        of_A = group.leading(leading, *how)
        of_difference = group.uniform_distance(*how)
        of_centred = group.smoothing_gain(*how)
        null_s2, null_exact = group.null(*how) if null else group.without_null()
        numbers = {
            "s": of_A.singular_values,
            "uniform_distance": of_difference.singular_values[..., 0],
            "smoothing_gain": of_centred.singular_values[..., 0],
            "null_s2": null_s2,
            "residuals": of_A.residuals,
            "exact": of_A.exact & of_difference.exact & of_centred.exact & null_exact,
        }
        found.append((at, numbers))
    shape = attention_map.shape[:2]
    return AttentionSpectra(**{name: _assembled(shape, [(at, x[name]) for at, x in found]) for name in found[0][1]})


@torch.no_grad()
def full_spectrum(
    attention_map: AttentionMap,
    batch: int,
    head: int,
    *,
    rows: Bool[Tensor, "#batch queries"] | None = None,
    columns: Bool[Tensor, "#batch keys"] | None = None,
) -> Float[Tensor, " values"]:
    """All singular values of one head, in falling order, in float64. O(T S min(T, S)): for T up to a thousand.

    Args:
        attention_map: the batch of maps.
        batch: which sequence.
        head: which head.
        rows: which queries; all that see a key by default.
        columns: which keys are real; all by default.

    Returns:
        As many values as the smaller of the asked queries and real keys.
    """
    part = attention_map.select(slice(batch, batch + 1), slice(head, head + 1))
    A: Tensor = part.dense()[0, 0].double()
    asked = _asked(part, (slice(batch, batch + 1), slice(0, 1)), rows)
    A = A[asked[0, 0]]
    if columns is not None:
        A = A[:, columns.expand(attention_map.shape[0], -1)[batch].to(A.device)]
    sigma: Tensor = torch.linalg.svdvals(A)
    return sigma


class _Group:
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
        asked = _asked(part, at, rows)
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


def _groups(attention_map: AttentionMap, k: int, memory: int) -> Iterator[tuple[tuple[slice, slice], Any]]:
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


def _asked(part: AttentionMap, at: tuple[slice, slice], rows: Tensor | None) -> Bool[Tensor, "batch heads queries"]:
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


def _assembled(shape: tuple[int, ...], parts: list[tuple[tuple[slice, slice], Tensor]]) -> Tensor:
    first = parts[0][1]
    out = first.new_empty(*shape, *first.shape[2:])
    for at, value in parts:
        out[at] = value
    return out
