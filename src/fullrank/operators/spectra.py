"""Singular values of attention maps, head by head: of A, of A − U and of (I − J)A, and what they are read against.

A map that fits the memory budget is computed once and kept for all of them (several heads at a time where they are
short); beyond the budget its products are recomputed by blocks. Spectra are of the submatrix of the asked queries and
real keys: rows and columns that are out are zero, which changes no non-zero singular value.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.operators.attention import AttentionMap
from fullrank.operators.heads import HeadGroup, asked_queries, head_groups
from fullrank.operators.krylov import Spectrum

__all__ = ["AttentionSpectra", "attention_singular_values", "attention_spectra", "full_spectrum"]

MEMORY = 128 << 20
"""Bytes of maps kept at a time, by default: one full head of 5,700 tokens, one causal head of 8,000."""


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
        (at, HeadGroup(part, at, rows, columns, memory, seed).leading(k, tolerance, max_iterations))
        for at, part in head_groups(attention_map, k, memory)
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
    for at, part in head_groups(attention_map, leading, memory):
        group = HeadGroup(part, at, rows, columns, memory, seed)
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
    asked = asked_queries(part, (slice(batch, batch + 1), slice(0, 1)), rows)
    A = A[asked[0, 0]]
    if columns is not None:
        A = A[:, columns.expand(attention_map.shape[0], -1)[batch].to(A.device)]
    sigma: Tensor = torch.linalg.svdvals(A)
    return sigma


def _assembled(shape: tuple[int, ...], parts: list[tuple[tuple[slice, slice], Tensor]]) -> Tensor:
    first = parts[0][1]
    out = first.new_empty(*shape, *first.shape[2:])
    for at, value in parts:
        out[at] = value
    return out
