"""The singular values of one head's attention map, and the bulk that independent rows would give."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

__all__ = ["HeadSpectrum", "quarter_circle"]


@dataclass(frozen=True)
class HeadSpectrum:
    """What one head's attention map does to directions over tokens.

    Attributes:
        stack: `decoder`, `encoder`, …
        layer: the block call, from 1.
        part: `self`, `cross`, …
        head: from 0.
        values: singular values, descending: all of them if `complete`, else the leading ones.
        tokens: how many rows or columns the map has (the smaller of the two).
        complete: whether `values` are all there are.
        null: singular values of the same map with each row's visible entries permuted; None where not computed.
        inverse_participation: Y₂, the mean over rows of Σ_s A_ts².
    """

    stack: str
    layer: int
    part: str
    head: int
    values: tuple[float, ...]
    tokens: int
    complete: bool
    null: tuple[float, ...] | None
    inverse_participation: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if self.null is not None:
            object.__setattr__(self, "null", tuple(float(value) for value in self.null))

    @property
    def key(self) -> tuple[str, int, str, int]:
        """Whose map it is: stack, layer, part, head."""
        return (self.stack, self.layer, self.part, self.head)

    @property
    def edge(self) -> float:
        """Where the bulk of T independent rows ends: 2√(Y₂ − 1/T).

        Entries of independent rows scatter around 1/T with variance (Y₂ − 1/T)/T; T × T of them have singular values
        on a quarter circle up to twice the root of T times that. NaN where Y₂ is unknown, 0 for uniform rows.
        """
        Y_2 = self.inverse_participation
        return math.nan if math.isnan(Y_2) else 2 * math.sqrt(max(Y_2 - 1 / self.tokens, 0.0))

    @property
    def outliers(self) -> int | None:
        """How many singular values after the first lie above the edge; None where the edge is unknown."""
        edge = self.edge
        return None if math.isnan(edge) else sum(value > edge for value in self.values[1:])


@functools.lru_cache(maxsize=16)
def quarter_circle(count: int) -> tuple[float, ...]:
    """Quantiles of the quarter-circle law with edge 1, descending, at the middles of `count` equal shares.

    The density is p(s) = (4/π)√(1 − s²) on [0, 1] with distribution F(s) = (2/π)(s√(1 − s²) + arcsin s); the k-th of
    `count` values (from 0) solves F(s) = 1 − (k + ½)/count, here by bisection to 2⁻⁵⁰.

    Args:
        count: how many values.

    Returns:
        The quantiles, in (0, 1).
    """
    return tuple(_quantile(1 - (k + 0.5) / count) for k in range(count))


def _quantile(share: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        s = (low + high) / 2
        if 2 / math.pi * (s * math.sqrt(1 - s * s) + math.asin(s)) < share:
            low = s
        else:
            high = s
    return (low + high) / 2
