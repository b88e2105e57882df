"""One number of several rows at a place: the mean over heads, and what its standard error cannot exceed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fullrank.table import Row

__all__ = ["by_layer", "entering", "mean_of"]


def entering(rows: Iterable[Row]) -> list[Row]:
    """The rows that a mean is of: those with a finite value; of a number that heads have, the heads' alone."""
    rows = list(rows)
    heads = [row for row in rows if row.head is not None]
    return [row for row in heads or rows if row.value is not None and math.isfinite(row.value)]


def mean_of(rows: Sequence[Row]) -> tuple[float, float | None]:
    """The mean of several rows, and the mean of their standard errors.

    Heads read the same sequences and are not independent: nothing is known of how they vary together. Whatever that is,
    the standard error of a mean is at most the mean of the standard errors (a norm of a sum is at most the sum of the
    norms), and it is just that where all heads move as one.

    Args:
        rows: at least one, from `entering`.

    Returns:
        The mean, and the bound of its standard error; None where a row has no standard error.
    """
    value = sum(row.value or 0.0 for row in rows) / len(rows)
    errors = [row.stderr for row in rows if row.stderr is not None]
    return value, sum(errors) / len(errors) if len(errors) == len(rows) else None


def by_layer(rows: Iterable[Row]) -> dict[int, tuple[float, float | None]]:
    """`mean_of` at each layer.

    Args:
        rows: of one metric at one place and scope.

    Returns:
        Layer to mean and standard error (None where a row has none); layers without a value are left out.
    """
    layers: dict[int, list[Row]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)
    return {layer: mean_of(known) for layer, group in sorted(layers.items()) if (known := entering(group))}
