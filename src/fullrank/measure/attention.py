"""What the attention maps look like, head by head, from one streaming pass over each call."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall, Event, Signal
from fullrank.measure.positions import real_or_all
from fullrank.measure.samples import Place, Samples
from fullrank.measure.summaries import Summaries
from fullrank.metrics.rows import (
    effective_keys_rows,
    log_context_gauge_rows,
    max_over_rows,
    mean_over_rows,
    normalized_entropy_rows,
    selectivity_from_summary,
)
from fullrank.operators import AttentionMap, Summary
from fullrank.table import Row

__all__ = ["SINK_SHARE", "AttentionObserver"]

SINK_SHARE = 0.3
"""A key is a sink of a head where it holds at least this share of the scope's attention on average (the threshold of
Gu et al., 2410.10781)."""

_NO_ROW = "no query of this scope sees enough keys"
_NO_ROWS = "fewer than two queries of this scope see enough keys"
_NO_VALUES = "the values handed to the kernel were not seen"


class AttentionObserver:
    """Row statistics of every head: entropy, selectivity, logits, sinks, branch energy, contrast gain.

    Each number is the mean over a sequence's rows in the scope, then over sequences. `no-sink` scopes leave out the
    keys that hold at least `SINK_SHARE` of a head's attention and renormalise the rows; where a head has no such key
    its `no-sink` numbers are its plain ones.

    Args:
        summaries: shared with other observers of the same calls, so that the pass over each map is made once.

    Attributes:
        kernels: by stack, names of the kernels that were called, in the order of their first calls.
    """

    needs: frozenset[Signal] = frozenset({"attention"})

    def __init__(self, summaries: Summaries | None = None) -> None:
        self._samples = Samples()
        self._summaries = summaries or Summaries()
        self.kernels: dict[str, dict[str, None]] = {}

    def see(self, event: Event) -> None:
        """Reduce one attention call to its numbers."""
        if not isinstance(event, AttentionCall):
            return
        self.kernels.setdefault(event.stack, {})[event.kernel] = None
        place = Place(event.stack, event.layer, "attention", event.part)
        scopes, summary = self._summaries.of(event)
        sequences, _, _, keys = event.attention.shape
        # positions count real tokens, so that a first token is at 0 however the batch is padded
        rank = real_or_all(event.real_keys, sequences, keys, event.attention.device).cumsum(-1) - 1
        for index, (scope, rows) in enumerate(scopes.items()):
            columns = summary.column_mean[index]  # (sequences, heads, keys)
            self._see_distribution(place, event.attention, summary, columns, rows, scope)
            self._see_logits(place, summary, rows, scope)
            mass, position = columns.max(-1)
            self._samples.add(place, "sink_mass", mass, scope=scope, undefined=_NO_ROW)
            where = rank.gather(1, position).double().masked_fill(mass.isnan(), torch.nan)
            self._samples.add(place, "sink_position", where, scope=scope, undefined=_NO_ROW, reduce="mode")
        self._see_branch(place, event, scopes)
        headline = list(scopes)[-1]
        sinks = summary.column_mean[-1] >= SINK_SHARE
        self._see_without_sinks(place, event.attention, summary, scopes[headline], sinks, headline)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        return self._samples.rows()

    @property
    def samples(self) -> Samples:
        """The numbers sequence by sequence."""
        return self._samples

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw."""
        self._samples.merge(other._samples)
        for stack, kernels in other.kernels.items():
            self.kernels.setdefault(stack, {}).update(kernels)

    def _see_distribution(
        self, place: Place, attention: AttentionMap, summary: Summary, columns: Tensor, rows: Tensor, scope: str
    ) -> None:
        per_head = rows.unsqueeze(1) & ~summary.entropy.isnan()  # rows left without a key by `without_keys` drop out
        H = summary.entropy
        per_row = {
            "entropy": H,
            "normalized_entropy": normalized_entropy_rows(H, summary.visible),
            "effective_keys": effective_keys_rows(H),
            "inverse_participation": summary.inverse_participation,
        }
        for metric, values in per_row.items():
            self._samples.add(place, metric, mean_over_rows(values, per_head), scope=scope, undefined=_NO_ROW)
        selectivity = selectivity_from_summary(H, columns, attention.visible_mass(columns), per_head, summary.row_sum)
        selectivity = torch.where(per_head.sum(-1) >= 2, selectivity, torch.nan)  # a row does not differ from itself
        self._samples.add(place, "selectivity", selectivity, scope=scope, undefined=_NO_ROWS)

    def _see_logits(self, place: Place, summary: Summary, rows: Tensor, scope: str) -> None:
        per_head = rows.unsqueeze(1) & ~summary.entropy.isnan()
        unseen = bool(per_head.any()) and bool(summary.max_logit[per_head.expand_as(summary.max_logit)].isnan().all())
        reason = "the scores before the softmax were not seen" if unseen else _NO_ROW
        gauge = log_context_gauge_rows(summary.logit_std, summary.visible)
        for metric, values in (("logit_std", summary.logit_std), ("log_context_gauge", gauge)):
            self._samples.add(place, metric, mean_over_rows(values, per_head), scope=scope, undefined=reason)
        self._samples.add(place, "max_logit", max_over_rows(summary.max_logit, per_head), scope=scope, undefined=reason)

    def _see_branch(self, place: Place, call: AttentionCall, scopes: dict[str, Tensor]) -> None:
        if call.value is None:
            missing = torch.full(call.attention.shape[:2], torch.nan)
            for scope in scopes:
                for metric in ("branch_energy", "contrast_gain"):
                    self._samples.add(place, metric, missing, scope=scope, undefined=_NO_VALUES)
            return
        AV = call.attention.matmat(call.value)
        centred = AV - call.attention.uniform().matmat(call.value)
        for scope, rows in scopes.items():
            keep = rows[:, None, :, None]
            energy = torch.where(keep, AV, 0).square().sum((-2, -1), dtype=torch.float64)
            rest = torch.where(keep, centred, 0).square().sum((-2, -1), dtype=torch.float64)
            none = _NO_ROW if not bool(rows.any()) else "the heads' outputs are zero"
            self._samples.add(place, "branch_energy", rest / energy, scope=scope, undefined=none)
        self._see_contrast(place, call, scopes, AV)

    def _see_contrast(self, place: Place, call: AttentionCall, scopes: dict[str, Tensor], AV: Tensor) -> None:
        assert call.value is not None
        sequences, heads, _, keys = call.attention.shape
        real = real_or_all(call.real_keys, sequences, keys, AV.device)
        spread_in = _spread(call.value.to(AV.dtype), real)
        spread_in = spread_in.repeat_interleave(heads // spread_in.shape[1], 1)  # key heads serve several heads each
        for scope, rows in scopes.items():
            several = (rows.sum(-1) > 1)[:, None]
            gain = torch.where(several, _spread(AV, rows) / spread_in, torch.nan).sqrt()
            none = "the values of all tokens are equal" if bool(several.any()) else _NO_ROWS
            self._samples.add(place, "contrast_gain", gain, scope=scope, undefined=none)

    def _see_without_sinks(
        self,
        place: Place,
        attention: AttentionMap,
        summary: Summary,
        rows: Tensor,
        sinks: Tensor,
        headline: str,
    ) -> None:
        scope = "no-sink" if headline == "all" else f"{headline}+no-sink"
        if bool(sinks.any()):
            attention = attention.without_keys(sinks)
            summary = attention.summary(groups=rows.unsqueeze(0))
        self._see_distribution(place, attention, summary, summary.column_mean[-1], rows, scope)


def _spread(X: Tensor, kept: Tensor) -> Tensor:
    """Mean squared distance of vectors from their mean, head by head: X (sequences, heads, tokens, width)."""
    n = kept.sum(-1)[:, None]
    keep = kept[:, None, :, None]
    mean = torch.where(keep, X, 0).sum(-2, keepdim=True, dtype=torch.float64) / n[..., None, None]
    return torch.where(keep, X - mean.to(X.dtype), 0).square().sum((-2, -1), dtype=torch.float64) / n
