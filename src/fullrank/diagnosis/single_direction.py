"""Rank one to the letter: tokens that differ, but along one direction alone."""

from __future__ import annotations

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Suspicion
from fullrank.diagnosis.sure import below
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["single_direction"]

_RANK = "centered_effective_rank"
_SCOPES = ("late", "no-first", "all")


def single_direction(evidence: Evidence, stack: str) -> Suspicion | None:
    """The layers after which the centred tokens have one direction, where they had several before the first block.

    Their energy share says nothing of it: tokens of different lengths and signs on one line keep all of their energy,
    before a norm and after it. No intervention tests it, since replacing the stream by its means would take the lengths
    away as well. It is a warning where a reference (the initialisation; of fresh weights the null) has several
    directions and every other number agrees; one huge token or channel sets the rank alone, which makes it a note.

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
    # what one layer has of its own making is no reason against the other ones
    against = {layer: _against(evidence, stack, ranks[layer]) for layer in layers}
    agreed = tuple(layer for layer in layers if not against[layer])
    first = ranks[(agreed or layers)[0]]
    why = "" if agreed else f"; {against[first.layer]}"
    return Suspicion(
        f"After layer {first.layer} of {max(ranks)} the {stack}'s tokens differ along one direction alone: effective "
        f"rank {number(first.value)} of the centred tokens, {number(given.value)} before the first block{why}.",
        stack,
        Severity.WARN if agreed else Severity.NOTE,
        layers=agreed or layers,
        comparisons=(_compared(evidence, stack, first),),
        exceeded=bool(agreed),
    )


def _one(evidence: Evidence, stack: str, row: Row) -> bool:
    several, initial = threshold("rank-collapse-depth.effective_rank.given"), evidence.initial(row)
    if evidence.at_floor(stack, row.layer) or (initial is not None and (initial.value or 0.0) < several):
        return False
    return below(row, threshold("rank-collapse-depth.effective_rank"))


def _against(evidence: Evidence, stack: str, row: Row) -> str:
    """What says otherwise, or is missing to say so."""

    def found(metric: str, scope: str | None = None) -> Row | None:
        return evidence.course(metric, stack, site="stream", part="out", scope=scope).get(row.layer)

    scopes = [one for scope in _SCOPES if (one := found(_RANK, scope)) is not None]
    channels, neighbours = found("channel_entropy"), found("intrinsic_dimension")
    if any(not below(one, threshold("rank-collapse-depth.effective_rank")) for one in scopes):
        return "a few tokens are all of it: without the first ones there are several directions"
    if channels is None or (channels.value or 0.0) < threshold("rank-collapse-depth.channel_entropy"):
        return "a few channels hold most of the energy, and the others are not seen beside them"
    if neighbours is None or not below(neighbours, threshold("rank-collapse-depth.dimensions")):
        known = "" if neighbours is None else f" along {number(neighbours.value)} dimensions"
        return f"a few large tokens may be all of it: neighbouring tokens differ{known or ' one does not know how'}"
    several = threshold("rank-collapse-depth.effective_rank.given")
    if evidence.initial(row) is None and not (evidence.weights == "fresh" and _null(evidence, stack) >= several):
        return "there is no initialisation to hold it against"
    return ""


def _null(evidence: Evidence, stack: str) -> float:
    return evidence.null(stack, _RANK) or 0.0


def _compared(evidence: Evidence, stack: str, row: Row) -> Comparison:
    compared, null = evidence.compared(row), _null(evidence, stack)
    if compared.expected is not None or not null:
        return compared
    return Comparison(_RANK, compared.where, compared.value, compared.stderr, "null", null)
