"""What becomes of a batch of samples from layer to layer: networks whose stream holds one vector per sample."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.measure.samples import Place, Reduce, Samples
from fullrank.table import Row

__all__ = ["OverSamples"]

_SCOPE = "samples"
_POINTS = 512
_FEW = "needs at least two samples in the batch"
_NO_RANK = "no rank: fewer than two samples, or no difference between them that the dtype can hold"


class OverSamples:
    """Metrics of sets of vectors, with the samples of a batch in the place of a sequence's tokens.

    Every batch gives one value, of the matrix X ∈ ℝ^{n×d} of its n samples with all their features; several batches
    give their mean and its standard error, and `n` of the row counts batches. The scope is `samples`.
    """

    def __init__(self) -> None:
        self._samples = Samples()
        self._previous: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_previous": {}}  # the last states stay here when the numbers travel

    def add(self, place: Place, X: Tensor) -> None:
        """Take in the state of one batch: X (1, samples, width)."""
        residual = metrics.residual(X)
        floor = metrics.floor(X.dtype)
        note = ""
        if bool((residual < floor).any()):
            dtype = str(X.dtype).removeprefix("torch.")
            note = f"at the float floor of {dtype}: differences between samples are rounding"
        self._add(place, "rms", metrics.rms(X))
        self._add(place, "similarity", metrics.similarity(X))
        self._add(place, "residual", residual, note=note)
        self._add_ranks(place, X, note)
        self._add(place, "orthogonality_gap", metrics.orthogonality_gap(X))
        self._add(place, "isometry_gap", metrics.isometry_gap(X))
        self._add(place, "channel_entropy", metrics.channel_entropy(X))
        self._add(place, "max_to_median", metrics.max_to_median(X))
        self._add(place, "max_abs", metrics.max_abs(X), reduce="largest")
        self._add(place, "distinct_at_dtype", metrics.distinct_at_dtype(X))
        self._add_change(place, X)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        return self._samples.rows()

    def merge(self, other: Self) -> None:
        """Take in the batches that another saw."""
        self._samples.merge(other._samples)

    def _add(
        self,
        place: Place,
        metric: str,
        value: Tensor,
        *,
        note: str = "",
        exact: bool = True,
        reduce: Reduce = "mean",
    ) -> None:
        self._samples.add(place, metric, value, scope=_SCOPE, undefined=_FEW, note=note, exact=exact, reduce=reduce)

    def _add_ranks(self, place: Place, X: Tensor, note: str) -> None:
        samples, width = X.shape[1:]
        both = metrics.both_singular_values(X)
        for prefix, sigma in zip(("", "centered_"), both, strict=True):
            found = metrics.ranks(sigma, tokens=samples, width=width, dtype=X.dtype, largest=both[0][..., 0])
            for name, value in found.items():
                value = value if samples > 1 else torch.full_like(value, torch.nan)
                said = note if prefix else ""  # ranks of what is left of rounding
                self._samples.add(place, prefix + name, value, scope=_SCOPE, undefined=_NO_RANK, note=said)

    def _add_change(self, place: Place, X: Tensor) -> None:
        before = None if place.layer == 0 else self._previous.get(place.stack)
        if before is not None and before.shape == X.shape:
            self._add(place, "update_share", metrics.update_share(X, before))
            self._add(place, "neighbour_cosine", metrics.neighbour_cosine(X, before))
            overlap = metrics.neighbourhood_overlap(X, before, points=_POINTS)
            self._add(place, "neighbourhood_overlap", overlap, exact=X.shape[1] <= _POINTS)
        self._previous[place.stack] = X.clone()  # the model may add to this tensor in place
