"""One number of several rows at a place: the mean over heads, and what its standard error cannot exceed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fullrank.table import Row

__all__ = ["by_layer", "entering", "mean_of", "over_heads"]


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


def over_heads(rows: Iterable[Row]) -> list[Row]:
    """Rows that belong to no head: at every place and layer the mean over heads, which is what a theory speaks of."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.source, row.stack, row.layer, row.site, row.part, row.scope, row.metric)
        groups.setdefault(key, []).append(row)
    found = []
    for group in groups.values():
        if known := entering(group):
            value, stderr = mean_of(known)
            exact = all(row.exact for row in known)
            note = "mean over heads"
            found.append(replace(known[0], head=None, value=value, stderr=stderr, exact=exact, note=note))
    return found
