"""Similarity after every feature has been standardised over all tokens of all sequences."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.measure.samples import Place, Samples
from fullrank.table import Row

__all__ = ["Standardized"]

_TOKENS_KEPT = 64
_ALONE = "needs at least two independent sequences: features are standardised over all of them"


class Standardized:
    """Keeps a few evenly spread tokens of each sequence until all have been seen.

    Standardising needs the features' mean and deviation over all sequences, which are known only at the end, and a
    cosine is not linear in them; so up to 64 tokens per sequence are kept, and the row is `exact` only where that was
    all of them.
    """

    def __init__(self) -> None:
        self._kept: dict[Place, list[tuple[Tensor, Tensor]]] = {}
        self._exact: dict[Place, bool] = {}

    def add(self, place: Place, X: Tensor, real: Tensor) -> None:
        """Take in one batch: X (sequences, tokens, width), real (sequences, tokens)."""
        order = torch.linspace(0, 1, _TOKENS_KEPT, device=X.device, dtype=torch.float64)
        count = real.sum(-1, keepdim=True)
        wanted = (order * (count - 1).clamp(min=0)).round().long()  # (sequences, kept): ranks among the real tokens
        positions = torch.argsort((~real).to(torch.int8), dim=-1, stable=True)  # real tokens first, in order
        kept = _TOKENS_KEPT if X.shape[1] > _TOKENS_KEPT else X.shape[1]
        if kept < X.shape[1]:
            index = positions.gather(1, wanted)
        else:
            index = torch.arange(X.shape[1], device=X.device).expand(X.shape[0], -1)
        chosen = X.gather(1, index.unsqueeze(-1).expand(-1, -1, X.shape[-1]))
        mask = real.gather(1, index)
        if kept < X.shape[1]:
            # a sequence with fewer tokens than are kept gives some of them twice: each counts once
            first = torch.ones_like(wanted, dtype=torch.bool)
            first[:, 1:] = wanted[:, 1:] != wanted[:, :-1]
            mask = mask & first
        self._kept.setdefault(place, []).append((chosen, mask))
        self._exact[place] = self._exact.get(place, True) and bool((count <= mask.sum(-1, keepdim=True)).all())

    def merge(self, other: Self) -> None:
        """Append the sequences of another."""
        for place, kept in other._kept.items():
            self._kept.setdefault(place, []).extend(kept)
            self._exact[place] = self._exact.get(place, True) and other._exact[place]

    def rows(self) -> list[Row]:
        """`similarity_standardized` of every place."""
        samples = Samples()
        for place, kept in self._kept.items():
            longest = max(chosen.shape[1] for chosen, _ in kept)
            X = torch.cat([_padded(chosen, longest) for chosen, _ in kept])
            mask = torch.cat([_padded(mask.unsqueeze(-1), longest).squeeze(-1) for _, mask in kept])
            some = mask.any(-1)
            X, mask = X[some], mask[some]
            if X.shape[0] > 1:
                values = metrics.similarity_standardized(X, mask)
            else:
                values = torch.full((1,), torch.nan)
            samples.add(place, "similarity_standardized", values, exact=self._exact[place], undefined=_ALONE)
        return samples.rows()


def _padded(X: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(X, (0, 0, 0, tokens - X.shape[1]))
