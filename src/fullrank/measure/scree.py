"""The singular values of single heads, kept for drawing, and those of the same maps with their rows shuffled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall
from fullrank.measure.samples import Place
from fullrank.operators import AttentionMap
from fullrank.operators.kept import Kept, keep, kept_bytes
from fullrank.operators.krylov import leading_singular_values
from fullrank.operators.linear import Restricted
from fullrank.operators.permuted import permuted
from fullrank.operators.spectra import attention_singular_values

__all__ = ["MapSpectrum", "map_spectra"]

_WHOLE = 512  # up to this many tokens all singular values of a head are taken
_WHOLE_NULL = 256  # and, where the quarter circle holds, up to this many those of its permuted map
_LEADING = 32  # beyond, this many


class MapSpectrum(NamedTuple):
    """Singular values of one head's map in the first sequence.

    Attributes:
        place: which call.
        head: which head.
        values: in falling order, all of them where `complete`.
        tokens: the smaller of the map's rows in the headline scope and its real keys.
        complete: whether `values` are all.
        null: those of the map with each row's visible entries permuted; None where not taken.
        inverse_participation: mean Σ A² of the rows; NaN where not every query sees every key, so that no quarter
            circle is the bulk of independent rows.
    """

    place: Place
    head: int
    values: tuple[float, ...]
    tokens: int
    complete: bool
    null: tuple[float, ...] | None
    inverse_participation: float


def map_spectra(
    place: Place, call: AttentionCall, rows: Tensor, columns: Tensor, Y2: Tensor, *, memory: int, seed: int
) -> list[MapSpectrum]:
    """The spectra of every head of the call's first sequence.

    Short maps are factorised. Of long ones the leading values are taken, and the permuted map only where the bulk of
    independent rows has no closed form (causal, windowed) and the map fits the memory budget.

    Args:
        place: of the call.
        call: the call.
        rows: (queries,) of the first sequence that are in scope.
        columns: (keys,) of the first sequence that are real.
        Y2: (heads,) mean Σ A² of these rows.
        memory: bytes of maps kept at a time.
        seed: of starts and permutations.

    Returns:
        One spectrum per head.
    """
    heads = call.attention.shape[1]
    first = call.attention.select(slice(0, 1), slice(0, heads))
    tokens = int(torch.minimum(rows.sum(), columns.sum()))
    whole = max(first.shape[2:]) <= _WHOLE
    circle = _sees_everything(first, rows, columns)
    if whole:
        kept = keep(first)
        values = _factorised(kept, rows, columns)
        shuffled = None if circle and max(first.shape[2:]) > _WHOLE_NULL else permuted(kept, first.mask, seed=seed)
        nulls = [None] * heads if shuffled is None else list(_factorised(shuffled, rows, columns))
    else:
        k = min(_LEADING, tokens)
        found = attention_singular_values(first, k, rows=rows[None], columns=columns[None], memory=memory, seed=seed)
        values = found.singular_values[0].cpu()
        nulls = [None if circle else _leading_null(first, h, rows, columns, k, memory, seed) for h in range(heads)]
    return [
        MapSpectrum(
            place=place,
            head=head,
            values=_rounded(values[head]),
            tokens=tokens,
            complete=whole,
            null=None if null is None else _rounded(null),
            inverse_participation=float(Y2[head]) if circle else float("nan"),
        )
        for head, null in enumerate(nulls)
    ]


def _sees_everything(first: AttentionMap, rows: Tensor, columns: Tensor) -> bool:
    visible = first.visible_count()[0]
    return bool((visible[:, rows] == columns.sum()).all())


def _factorised(kept: Kept, rows: Tensor, columns: Tensor) -> Tensor:
    """All singular values of the asked rows and real columns, (heads, values), on the CPU."""
    _, heads, _, keys = kept.shape
    A = kept.matmat(torch.eye(keys, dtype=kept.dtype, device=kept.device).expand(1, heads, keys, keys))[0]
    sigma: Tensor = torch.linalg.svdvals(A[:, rows][:, :, columns])
    return sigma.cpu()


def _leading_null(
    first: AttentionMap, head: int, rows: Tensor, columns: Tensor, k: int, memory: int, seed: int
) -> Tensor | None:
    """The leading singular values of one permuted map; None where it is too large or its visible keys too scattered."""
    part = first.select(slice(0, 1), slice(head, head + 1))
    if kept_bytes(part) > memory:
        return None
    shuffled = permuted(keep(part), part.mask, seed=seed)
    if shuffled is None:
        return None
    operator = Restricted(shuffled, rows[None, None], columns[None, None])
    return leading_singular_values(operator, k, seed=seed).singular_values[0, 0].cpu()


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())
