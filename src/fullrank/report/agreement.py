"""How far theories are from a measurement they are laid over, beside what a constant would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fullrank.report.wording import number
from fullrank.table import headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["agreement", "of_overlaid"]


def agreement(measured: Report, predicted: Report, metric: str = "similarity") -> str:
    """How far the primary theory is from a measurement, on average over layers, in one sentence.

    Args:
        measured: with the metric after every block.
        predicted: with a prediction.
        metric: of the stream.

    Returns:
        Its error, and that of 'nothing changes with depth'; empty where they have no layers in common.
    """
    seen, said = _course(measured, "measured", metric), _course(predicted, str(predicted.primary), metric)
    layers = [layer for layer in seen if layer in said and layer > 0]
    if not layers or 0 not in seen:
        return ""
    wrong = sum(abs(seen[layer] - said[layer]) for layer in layers) / len(layers)
    constant = sum(abs(seen[layer] - seen[0]) for layer in layers) / len(layers)
    return (
        f"{metric} over {len(layers)} layers: {predicted.primary} errs by {number(wrong)} on average, "
        f"'nothing changes with depth' by {number(constant)}."
    )


def of_overlaid(reports: Sequence[Report]) -> str:
    """`agreement` of the first measured and the first predicted report; empty where there are not both."""
    measured = [one for one in reports if one.prediction is None]
    predicted = [one for one in reports if one.prediction is not None]
    return agreement(measured[0], predicted[0]) if measured and predicted else ""


def _course(report: Report, source: str, metric: str) -> dict[int, float]:
    place = (source, metric, "stream", "out", None)
    rows = [row for row in report.rows if (row.source, row.metric, row.site, row.part, row.head) == place]
    stack = rows[0].stack if rows else ""
    scope = headline({row.scope for row in rows if row.stack == stack}) if rows else ""
    return {row.layer: row.value for row in rows if (row.stack, row.scope) == (stack, scope) and row.value is not None}
