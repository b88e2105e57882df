"""What the rows say together that no row says alone, in a sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["remarks"]

_READ = ("stable_rank", "centered_stable_rank", "residual")
_FACTOR = 1.5
"""A first token is worth a sentence where a number with it and without it differ by this factor."""


def remarks(rows: Iterable[Row]) -> list[str]:
    """Where one first token sets the token metrics of a stack: the metric that it moves most, and at which layer.

    Args:
        rows: of one report.

    Returns:
        At most one sentence per source and stack.
    """
    found: dict[tuple[str, str], tuple[float, str]] = {}
    whole: dict[tuple[str, str, int, str], float] = {}
    without: dict[tuple[str, str, int, str], float] = {}
    for row in rows:
        if row.metric in _READ and (row.site, row.part) == ("stream", "out") and row.value is not None:
            of_scope = {"all": whole, "no-first": without}.get(row.scope)
            if of_scope is not None:
                of_scope[row.source, row.stack, row.layer, row.metric] = row.value
    for key, value in without.items():
        source, stack, layer, metric = key
        factor = _factor(whole.get(key), value)
        sentence = (
            f"the first token of each sequence sets token metrics of {stack}: at layer {layer}, {metric} is "
            f"{number(whole.get(key))} with it and {number(value)} without it (scope no-first)."
        )
        if factor >= _FACTOR and factor > found.get((source, stack), (0.0, ""))[0]:
            found[source, stack] = factor, sentence
    return [sentence for _, sentence in found.values()]


def _factor(one: float | None, other: float) -> float:
    if one is None or min(one, other) <= 0 or math.isinf(max(one, other)):
        return 1.0
    return max(one / other, other / one)
