"""The singular values of attention maps: the outlier, the bulk, and what centring leaves."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Self

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall, Event, Signal
from fullrank.measure.chosen import Heads
from fullrank.measure.positions import real_or_all
from fullrank.measure.samples import Place, Samples
from fullrank.measure.scree import MapSpectrum, map_spectra
from fullrank.measure.summaries import Summaries
from fullrank.operators import AttentionMap, Full
from fullrank.operators.spectra import MEMORY, AttentionSpectra, attention_spectra
from fullrank.table import Row

__all__ = ["SEQUENCES", "SpectrumObserver"]

SEQUENCES = 4  # of a batch: spectra are the dear part, and this many give their spread
_SMALL_SPREAD = 0.7  # up to this logit deviation the bulk edge of independent rows is 2√(Y₂ − 1/T)

_METRICS = (
    "attention_s1",
    "attention_s2",
    "outlier_share",
    "attention_stable_rank",
    "uniform_distance",
    "smoothing_gain",
    "bulk_excess",
)
_NO_ROW = "no query of this scope sees enough keys"
_ONE_ROW = "one query: the singular value of a single row is its length and says nothing of mixing"
_NO_NULL = "the map could not be permuted (too large, or visible keys scattered), and no closed form holds for it"


class SpectrumObserver:
    """Singular values of every head of every call, over the rows of the headline scope.

    They are taken of at most four sequences of each batch (or `sequences`); a row's `n` says of how many.

    Args:
        summaries: shared with the observer of rows, so that the pass over each map is made once.
        seed: of starting blocks and permutations.
        memory: bytes of maps kept at a time; larger maps are multiplied by blocks.
        heads: the only heads that are looked at; all by default.
        drawn: whether to keep the singular values of the first sequence for drawing.
        sequences: of how many sequences of a batch they are taken.
    """

    needs: frozenset[Signal] = frozenset({"attention"})

    def __init__(
        self,
        summaries: Summaries | None = None,
        *,
        seed: int = 0,
        memory: int = MEMORY,
        heads: Heads | None = None,
        drawn: bool = True,
        sequences: int = SEQUENCES,
    ) -> None:
        self._samples = Samples()
        self._summaries = summaries or Summaries()
        self._seed = seed
        self._memory = memory
        self._heads = heads
        self._draws = drawn
        self._sequences = sequences
        self._drawn: dict[Place, list[MapSpectrum]] = {}

    def see(self, event: Event) -> None:
        """Take the spectra of one attention call."""
        if not isinstance(event, AttentionCall):
            return
        place = Place(event.stack, event.layer, "attention", event.part)
        whole, heads, _, keys = event.attention.shape
        named = None if self._heads is None else self._heads.of(event.stack, event.layer, heads)  # None: all
        if named == ():
            return
        scopes, summary = self._summaries.of(event)
        scope, rows = list(scopes.items())[-1]
        batch = min(whole, self._sequences)
        rows = rows[:batch]
        columns = real_or_all(event.real_keys, whole, keys, rows.device)[:batch]
        attention = event.attention.select(slice(0, batch), slice(0, heads))
        if not bool(rows.any()) or event.attention.shape[2] == 1:
            reason = _NO_ROW if event.attention.shape[2] > 1 else _ONE_ROW
            self._see_nothing(place, scope, batch, named or tuple(range(heads)), reason)
            return
        found = self._spectra(attention, rows, columns, named)
        at = slice(None) if named is None else list(named)
        keep = rows.unsqueeze(1) & ~summary.entropy[:batch, at].isnan()
        frobenius = torch.where(keep, summary.inverse_participation[:batch, at], 0).sum(-1)  # ‖A‖_F² over these rows
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
            self._samples.add(place, metric, values, scope=scope, exact=exact, undefined=_NO_ROW, heads=named)
        Y2 = frobenius / keep.sum(-1)
        spread = torch.where(keep, summary.logit_std[:batch, at], 0).sum(-1) / keep.sum(-1)
        null = self._null(event, found.null_s2.double(), Y2, spread, columns)
        self._samples.add(place, "bulk_excess", s2 / null, scope=scope, exact=exact, undefined=_NO_NULL, heads=named)
        if self._draws and place not in self._drawn and bool(rows[0].any()):
            self._drawn[place] = self._draw(place, event, rows[0], columns[0], Y2[0], named)

    def pass_over(self, event: Event, reason: str) -> None:
        """Take none of a call, and say why where no other call of its place gives them."""
        if isinstance(event, AttentionCall):
            heads = event.attention.shape[1]
            named = None if self._heads is None else self._heads.of(event.stack, event.layer, heads)
            if named == ():
                return
            scope = list(self._summaries.of(event)[0])[-1]
            place = Place(event.stack, event.layer, "attention", event.part)
            self._see_nothing(place, scope, 1, named or tuple(range(heads)), reason)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        return self._samples.rows()

    @property
    def samples(self) -> Samples:
        """The numbers sequence by sequence."""
        return self._samples

    def spectra(self) -> tuple[MapSpectrum, ...]:
        """The singular values kept for drawing."""
        return tuple(one for drawn in self._drawn.values() for one in drawn)

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw; of the spectra, those this one does not have."""
        self._samples.merge(other._samples)
        self._drawn = {**other._drawn, **self._drawn}

    def _spectra(
        self, attention: AttentionMap, rows: Tensor, columns: Tensor, named: tuple[int, ...] | None
    ) -> AttentionSpectra:
        """Of all heads together, or of the named ones alone, one by one."""
        parts = [attention] if named is None else [attention.select(slice(None), slice(h, h + 1)) for h in named]
        found = [
            attention_spectra(part, rows=rows, columns=columns, seed=self._seed, memory=self._memory) for part in parts
        ]
        names = [field.name for field in fields(AttentionSpectra)]
        return AttentionSpectra(**{name: torch.cat([getattr(one, name) for one in found], 1) for name in names})

    def _draw(
        self,
        place: Place,
        call: AttentionCall,
        rows: Tensor,
        columns: Tensor,
        Y2: Tensor,
        named: tuple[int, ...] | None,
    ) -> list[MapSpectrum]:
        how = {"memory": self._memory, "seed": self._seed}
        if named is None:
            return map_spectra(place, call, rows, columns, Y2, **how)
        drawn = []
        for index, head in enumerate(named):
            one = replace(call, attention=call.attention.select(slice(None), slice(head, head + 1)))
            (found,) = map_spectra(place, one, rows, columns, Y2[index : index + 1], **how)
            drawn.append(found._replace(head=head))
        return drawn

    def _see_nothing(self, place: Place, scope: str, batch: int, heads: tuple[int, ...], reason: str) -> None:
        nothing = torch.full((batch, len(heads)), torch.nan)
        for metric in _METRICS:
            self._samples.add(place, metric, nothing, scope=scope, undefined=reason, heads=heads)

    def _null(self, call: AttentionCall, permuted: Tensor, Y2: Tensor, spread: Tensor, columns: Tensor) -> Tensor:
        """s₂ of the permuted map; where it was not taken, the edge of independent rows where that holds."""
        if not bool(permuted.isnan().any()):
            return permuted
        T = columns.sum(-1, keepdim=True).double()
        edge = 2 * (Y2 - 1 / T).clamp(min=0).sqrt()
        holds = (spread <= _SMALL_SPREAD) & isinstance(call.attention.mask, Full)
        return torch.where(permuted.isnan() & holds, edge, permuted)
