"""The singular values of attention maps: the outlier, the bulk, and what centring leaves."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall, Event, Signal
from fullrank.measure.positions import real_or_all
from fullrank.measure.samples import Place, Samples
from fullrank.measure.summaries import Summaries
from fullrank.operators import Full
from fullrank.operators.kept import Kept, keep
from fullrank.operators.permuted import permuted
from fullrank.operators.spectra import MEMORY, attention_singular_values, attention_spectra
from fullrank.table import Row

__all__ = ["MapSpectrum", "SpectrumObserver"]

_SEQUENCES = 4  # of a batch: spectra are the dear part, and this many give their spread
_WHOLE = 512  # up to this many tokens all singular values of a head are taken, and those of its permuted map
_LEADING = 32  # beyond, this many
_SMALL_SPREAD = 0.7  # up to this logit deviation the bulk edge of independent rows is 2√(Y₂ − 1/T)

_NO_ROW = "no query of this scope sees enough keys"
_TOO_LARGE = "the map was too large to be kept and permuted, and its logits spread too far for the closed form"


class MapSpectrum(NamedTuple):
    """Singular values of one head's map in the first sequence.

    Attributes:
        place: which call.
        head: which head.
        values: in falling order, all of them where `complete`.
        tokens: the smaller of the map's rows in the headline scope and its real keys.
        complete: whether `values` are all.
        null: those of the map with each row's visible entries permuted; None where not taken.
        inverse_participation: mean Σ A² of the rows.
    """

    place: Place
    head: int
    values: tuple[float, ...]
    tokens: int
    complete: bool
    null: tuple[float, ...] | None
    inverse_participation: float


class SpectrumObserver:
    """Singular values of every head of every call, over the rows of the headline scope.

    They are taken of at most four sequences of each batch; a row's `n` says of how many.

    Args:
        summaries: shared with the observer of rows, so that the pass over each map is made once.
        seed: of starting blocks and permutations.
        memory: bytes of maps kept at a time; larger maps are multiplied by blocks.
    """

    needs: frozenset[Signal] = frozenset({"attention"})

    def __init__(self, summaries: Summaries | None = None, *, seed: int = 0, memory: int = MEMORY) -> None:
        self._samples = Samples()
        self._summaries = summaries or Summaries()
        self._seed = seed
        self._memory = memory
        self._maps: dict[tuple[Place, int], MapSpectrum] = {}

    def see(self, event: Event) -> None:
        """Take the spectra of one attention call."""
        if not isinstance(event, AttentionCall):
            return
        place = Place(event.stack, event.layer, "attention", event.part)
        scopes, summary = self._summaries.of(event)
        scope, rows = list(scopes.items())[-1]
        whole, heads, _, keys = event.attention.shape
        batch = min(whole, _SEQUENCES)
        rows = rows[:batch]
        columns = real_or_all(event.real_keys, whole, keys, rows.device)[:batch]
        attention = event.attention.select(slice(0, batch), slice(0, heads))
        if not bool(rows.any()):
            self._see_nothing(place, scope, batch, heads)
            return
        found = attention_spectra(attention, rows=rows, columns=columns, seed=self._seed, memory=self._memory)
        keep = rows.unsqueeze(1) & ~summary.entropy[:batch].isnan()
        frobenius = torch.where(keep, summary.inverse_participation[:batch], 0).sum(-1)  # ‖A‖_F² over these rows
        s1, s2 = found.s[..., 0].double(), found.s[..., 1].double()
        exact = bool(found.exact.all())
        numbers = {
            "attention_s1": s1,
            "attention_s2": s2,
            "outlier_share": s1.square() / frobenius,
            "attention_stable_rank": frobenius / s1.square(),
            "uniform_distance": found.uniform_distance.double(),
            "smoothing_gain": found.smoothing_gain.double(),
        }
        for metric, values in numbers.items():
            self._samples.add(place, metric, values, scope=scope, exact=exact, undefined=_NO_ROW)
        Y2 = frobenius / keep.sum(-1)
        spread = torch.where(keep, summary.logit_std[:batch], 0).sum(-1) / keep.sum(-1)
        null = self._null(event, found.null_s2.double(), Y2, spread, columns)
        self._samples.add(place, "bulk_excess", s2 / null, scope=scope, exact=exact, undefined=_TOO_LARGE)
        self._keep_first(place, event, rows, columns, Y2)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        return self._samples.rows()

    def spectra(self) -> tuple[MapSpectrum, ...]:
        """The singular values kept for drawing."""
        return tuple(self._maps.values())

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw; of the spectra, those this one does not have."""
        self._samples.merge(other._samples)
        self._maps = {**other._maps, **self._maps}

    def _see_nothing(self, place: Place, scope: str, batch: int, heads: int) -> None:
        nothing = torch.full((batch, heads), torch.nan)
        for metric in ("attention_s1", "attention_s2", "outlier_share", "attention_stable_rank"):
            self._samples.add(place, metric, nothing, scope=scope, undefined=_NO_ROW)
        for metric in ("uniform_distance", "smoothing_gain", "bulk_excess"):
            self._samples.add(place, metric, nothing, scope=scope, undefined=_NO_ROW)

    def _null(self, call: AttentionCall, permuted: Tensor, Y2: Tensor, spread: Tensor, columns: Tensor) -> Tensor:
        """s₂ of the permuted map; where it was not taken, the edge of independent rows where that holds."""
        if not bool(permuted.isnan().any()):
            return permuted
        T = columns.sum(-1, keepdim=True).double()
        edge = 2 * (Y2 - 1 / T).clamp(min=0).sqrt()
        holds = (spread <= _SMALL_SPREAD) & isinstance(call.attention.mask, Full)
        return torch.where(permuted.isnan() & holds, edge, permuted)

    def _keep_first(self, place: Place, call: AttentionCall, rows: Tensor, columns: Tensor, Y2: Tensor) -> None:
        """The singular values of the first sequence's heads, for drawing."""
        heads = call.attention.shape[1]
        if (place, 0) in self._maps or not bool(rows[0].any()):
            return
        size = int(torch.minimum(rows[0].sum(), columns[0].sum()))
        first = call.attention.select(slice(0, 1), slice(0, heads))
        whole = max(call.attention.shape[2:]) <= _WHOLE
        nulls: list[Tensor | None]
        if whole:
            kept = keep(first)
            shuffled = permuted(kept, first.mask, seed=self._seed)
            values = _singular_values(kept, rows[0], columns[0])
            nulls = [None] * heads if shuffled is None else list(_singular_values(shuffled, rows[0], columns[0]))
        else:
            asked = min(_LEADING, size)
            found = attention_singular_values(
                first, asked, rows=rows[:1], columns=columns[:1], memory=self._memory, seed=self._seed
            )
            values, nulls = found.singular_values[0].cpu(), [None] * heads
        for head in range(heads):
            null_values = nulls[head]
            self._maps[place, head] = MapSpectrum(
                place=place,
                head=head,
                values=tuple(float(f"{v:.6g}") for v in values[head].tolist()),
                tokens=size,
                complete=whole,
                null=None if null_values is None else tuple(float(f"{v:.6g}") for v in null_values.tolist()),
                inverse_participation=float(Y2[0, head]),
            )


def _singular_values(kept: Kept, rows: Tensor, columns: Tensor) -> Tensor:
    """All singular values of the asked rows and real columns, (heads, values), on the CPU."""
    _, heads, _, keys = kept.shape
    A = kept.matmat(torch.eye(keys, dtype=kept.dtype, device=kept.device).expand(1, heads, keys, keys))[0]
    sigma: Tensor = torch.linalg.svdvals(A[:, rows][:, :, columns])
    return sigma.cpu()
