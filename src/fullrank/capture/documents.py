"""Packed rows taken apart: what was seen of a row that holds several documents becomes one sequence per document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall, Event, StreamState
from fullrank.operators import AttentionMap, AttentionOperator, DenseAttention, Scores
from fullrank.operators.masks import Mask, recognise

__all__ = ["Documents"]

_MOST = 4  # taken apart, the rows may grow to this many times their tokens


class _Span(NamedTuple):
    """Tokens [start, stop) of one row."""

    row: int
    start: int
    stop: int


class Documents:
    """Which stretches of packed rows are one document each, as positions that start anew say.

    Tokens of different documents are no sequence: similarity, ranks and the later half are those of each document, and
    `n` counts documents. Attention is taken apart only where its mask keeps the documents apart; whether a model does
    so from positions alone depends on the model, its cache and its mask, so that the mask of every call is asked.

    Args:
        spans: row, first token and one past the last of each document, rows in order.
        shape: (rows, tokens) of the batch.
        real: (rows, tokens) bool, which tokens are not padding.

    Attributes:
        count: how many documents there are.
        notes: sentences for the reader of a report.
    """

    def __init__(self, spans: Sequence[tuple[int, int, int]], shape: tuple[int, int], real: Tensor) -> None:
        found = [_Span(*span) for span in spans]
        several = [span for span in found if span.stop - span.start > 1]
        longest = max(span.stop - span.start for span in several)
        most = max(1, _MOST * shape[0] * shape[1] // longest)
        kept = set(sorted(several, key=lambda span: span.start - span.stop)[:most])
        self._spans = [span for span in several if span in kept]
        self._shape = shape
        self._longest = longest
        self._masks: dict[int, tuple[Mask, Mask | None]] = {}
        places = torch.arange(longest, device=real.device)
        length = torch.tensor([span.stop - span.start for span in self._spans], device=real.device)
        first = torch.tensor([span.start for span in self._spans], device=real.device)
        self._row = torch.tensor([span.row for span in self._spans], device=real.device)
        inside = places < length[:, None]  # (documents, longest)
        self._token = torch.where(inside, first[:, None] + places, first[:, None])
        self._real = real[self._row[:, None], self._token] & inside
        self.count = len(found)
        self.notes: list[str] = []
        if len(self._spans) < len(found):
            self._say("of the packed documents the shortest are left out, or those of a single token.")

    @classmethod
    def of(cls, positions: Tensor | None, shape: tuple[int, int], real: Tensor | None) -> Documents | None:
        """The documents of a batch.

        Args:
            positions: (rows | 1, tokens), the position of each token in its document.
            shape: (rows, tokens).
            real: (rows, tokens) bool, which tokens are not padding; None when all are.

        Returns:
            None where no row holds more than one document.
        """
        if positions is None or positions.shape[-1] != shape[1] or positions.shape[0] not in (1, shape[0]):
            return None
        mask = torch.ones(shape, dtype=torch.bool) if real is None else real.cpu()
        spans = []
        for row, (place, seen) in enumerate(zip(positions.cpu().expand(shape), mask, strict=True)):
            at = seen.nonzero()[:, 0]
            if not at.numel():
                continue
            anew = (place[at][1:] <= place[at][:-1]).nonzero()[:, 0] + 1
            starts = [0, *anew.tolist()]
            ends = [*anew.tolist(), at.numel()]
            spans += [(row, int(at[a]), int(at[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)]
        if len(spans) <= len({row for row, _, _ in spans}):
            return None
        device = positions.device
        if all(stop - start < 2 for _, start, stop in spans):
            return None
        return cls(spans, shape, mask.to(device))

    def clear(self) -> None:
        """Forget the masks: the forward is over."""
        self._masks = {}

    def apart(self, event: Event) -> Event:
        """The event with one sequence per document; as it is where it is not of these rows."""
        if isinstance(event, StreamState) and tuple(event.value.shape[:2]) == self._shape:
            self._to(event.value.device)
            value = event.value[self._row[:, None], self._token]
            return replace(event, value=value, real=self._real)
        if isinstance(event, AttentionCall) and not event.part.startswith("cross"):
            return self._call_apart(event)
        return event

    def _call_apart(self, call: AttentionCall) -> AttentionCall:
        rows, _, queries, keys = call.attention.shape
        if (rows, queries) != self._shape or queries != keys:
            return call
        self._to(call.attention.device)
        attention = self._map(call.attention)
        if attention is None:
            return call
        value = None if call.value is None else self._heads(call.value)
        causal = bool(attention.mask.is_causal)
        return replace(
            call, attention=attention, value=value, real_queries=self._real, real_keys=self._real, causal=causal
        )

    def _map(self, attention: AttentionMap) -> AttentionMap | None:
        mask = self._mask(attention.mask, attention)
        if mask is None:
            return None
        if isinstance(attention, DenseAttention):
            logits, sink = attention.logits, attention.sink
            lowest = 0.0 if logits is None else torch.finfo(logits.dtype).min
            return DenseAttention(
                self._blocks(attention.weights, 0.0),
                logits=None if logits is None else self._blocks(logits, lowest),
                visible=mask,
                sink=None if sink is None else self._heads(sink.unsqueeze(-1)).squeeze(-1),
            )
        scores = getattr(attention, "scores", None)
        if not isinstance(scores, Scores) or scores.bias is not None:
            self._say(
                "attention with a bias by distance is reported for whole packed rows, as the mask of the call is."
            )
            return None
        query, key = self._heads(scores.query), self._heads(scores.key)
        return AttentionOperator(replace(scores, query=query, key=key, mask=mask))

    def _mask(self, mask: Mask, attention: AttentionMap) -> Mask | None:
        """Who sees whom inside the documents; None where a query sees a key of another one."""
        found = self._masks.get(id(mask))
        if found is not None and found[0] is mask:
            return found[1]
        rows, heads, tokens, _ = attention.shape
        count = mask.visible_count((rows, heads, tokens, tokens), attention.device).expand(rows, -1, -1)
        visible = torch.zeros(
            len(self._spans), count.shape[1], self._longest, self._longest, dtype=torch.bool, device=attention.device
        )
        checks = []
        for index, span in enumerate(self._spans):
            here, size = slice(span.start, span.stop), span.stop - span.start
            one = mask.select(slice(span.row, span.row + 1), slice(0, heads))
            block = one.block(here, here, (1, heads, tokens, tokens), device=attention.device)
            visible[index, :, :size, :size] = True if block is None else block[0]
            real = self._real[index, :size]
            seen = visible[index, :, :size, :size].sum(-1)
            checks.append((seen == count[span.row, :, here])[:, real].all())
        apart = bool(torch.stack(checks).all())
        if not apart:
            self._say(
                "attention sees across the packed documents: positions start anew, but the mask of its calls does not "
                "keep the documents apart (transformers makes such a mask only where there is no attention_mask and no "
                "cache). Attention is reported for whole rows."
            )
        read = recognise(visible) if apart else None
        self._masks = {id(mask): (mask, read), **dict(list(self._masks.items())[:3])}
        return read

    def _heads(self, Y: Tensor) -> Tensor:
        """(rows, heads, tokens, width) as (documents, heads, longest, width)."""
        return Y.transpose(1, 2)[self._row[:, None], self._token].transpose(1, 2)

    def _blocks(self, A: Tensor, outside: float) -> Tensor:
        """(rows, heads, tokens, tokens) as the diagonal blocks of the documents, `outside` where they are shorter."""
        found = A.new_full((len(self._spans), A.shape[1], self._longest, self._longest), outside)
        for index, span in enumerate(self._spans):
            size = span.stop - span.start
            found[index, :, :size, :size] = A[span.row, :, span.start : span.stop, span.start : span.stop]
        return found

    def _to(self, device: torch.device) -> None:
        if self._row.device != device:
            self._row, self._token = self._row.to(device), self._token.to(device)
            self._real = self._real.to(device)

    def _say(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
