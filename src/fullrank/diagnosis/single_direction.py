"""Rank one to the letter: tokens that differ, but along one direction alone."""

from __future__ import annotations

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Suspicion
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["single_direction"]

_RANK = "centered_effective_rank"


def single_direction(evidence: Evidence, stack: str) -> Suspicion | None:
    """The layers after which the centred tokens have one direction, where they had several before the first block.

    Their energy share says nothing of it: tokens of different lengths and signs on one line keep all of their energy.
    No intervention tests it, since replacing the stream by its means would take the lengths away as well.

    Args:
        evidence: rows of ranks.
        stack: of the model.

    Returns:
        What to suspect; None for several directions, few tokens, or no rows of ranks.
    """
    ranks = evidence.course(_RANK, stack, site="stream", part="out")
    given = ranks.get(min(ranks, default=0))
    if given is None or (given.value or 0.0) < threshold("rank-collapse-depth.effective_rank.given"):
        return None
    layers = tuple(layer for layer, row in ranks.items() if layer and _one(evidence, stack, row))
    if not layers:
        return None
    first = ranks[layers[0]]
    return Suspicion(
        f"After layer {first.layer} of {max(ranks)} the {stack}'s tokens differ along one direction alone: effective "
        f"rank {number(first.value)} of the centred tokens, {number(given.value)} before the first block.",
        stack,
        Severity.WARN,
        layers=layers,
        comparisons=(evidence.compared(first),),
    )


def _one(evidence: Evidence, stack: str, row: Row) -> bool:
    limit = threshold("rank-collapse-depth.effective_rank")
    initial = evidence.initial(row)
    if evidence.at_floor(stack, row.layer) or (initial is not None and (initial.value or 0.0) < 2 * limit):
        return False
    return (row.value or 0.0) + 2 * (row.stderr or 0.0) < limit
