"""Redundant heads: heads of one layer that write the same, up to size."""

from __future__ import annotations

import math

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.kinds import PART, Place
from fullrank.diagnosis.sure import above
from fullrank.diagnosis.thresholds import effect_limits, threshold
from fullrank.report.verdict import Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]

NAME = "redundant-heads"


def _look(evidence: Evidence) -> Looked:
    suspicions, said, floor = [], [], False
    for stack in evidence.stacks:
        nearest = evidence.heads("nearest_head_similarity", stack, site="attention", part=PART)
        at_floor = {layer for layer, _ in nearest if evidence.at_floor(stack, layer - 1)}
        floor |= bool(at_floor)
        nearest = {place: row for place, row in nearest.items() if place[0] not in at_floor}
        if not nearest:
            continue
        groups = _groups(evidence, stack, nearest)
        layers = sorted({layer for layer, _ in groups})
        suspicions += [_suspicion(evidence, stack, layer, nearest, groups) for layer in layers]
        (layer, head), most = max(nearest.items(), key=lambda item: float(item[1].value or 0))
        left_out = f"; layers that read a state at the float floor ({_numbers(at_floor)}) left out" if at_floor else ""
        said.append(
            f"{stack}: no two heads of a layer write more alike than cosine {number(most.value)} (layer {layer}, head "
            f"{head}){left_out}"
        )
    if suspicions:
        return Looked(tuple(suspicions))
    if floor and not said:
        return Looked(unchecked="every layer reads a state at the float floor: its heads write rounding errors.")
    if not said:
        return Looked(unchecked="needs what heads write through W_O (weights=True, --weights).")
    return Looked(clear=f"{'; '.join(said)}.")


def _groups(evidence: Evidence, stack: str, nearest: dict[Place, Row]) -> dict[Place, tuple[int, ...]]:
    """Heads that write alike, joined by who is nearest to whom: (layer, lowest head) → all of them."""
    which = evidence.heads("nearest_head", stack, site="attention", part=PART)
    leader: dict[Place, int] = {}
    for place, row in nearest.items():
        twin = which.get(place)
        if twin is None or twin.value is None or not _alike(evidence, row):
            continue
        layer, head = place
        pair = [leader.get((layer, one), one) for one in (head, int(twin.value))]
        members = [one for one in leader if one[0] == layer and leader[one] in pair]
        for one in (*members, place, (layer, int(twin.value))):
            leader[one] = min(pair)
    groups: dict[Place, tuple[int, ...]] = {}
    for (layer, head), first in sorted(leader.items()):
        groups[layer, first] = (*groups.get((layer, first), ()), head)
    return groups


def _alike(evidence: Evidence, row: Row) -> bool:
    initial = None if evidence.weights == "fresh" else evidence.initial(row)
    usual = initial is not None and float(initial.value or 0) > threshold(f"{NAME}.initialisation")
    return above(row, threshold(f"{NAME}.similarity")) and not usual


def _suspicion(
    evidence: Evidence,
    stack: str,
    layer: int,
    nearest: dict[Place, Row],
    groups: dict[Place, tuple[int, ...]],
) -> Suspicion:
    inside = [heads for (of, _), heads in groups.items() if of == layer]
    rows = [nearest[layer, head] for heads in inside for head in heads if (layer, head) in nearest]
    alike = [row for row in rows if _alike(evidence, row)]
    least = min(alike, key=lambda row: float(row.value or 0))
    cosine = min(1.0, float(least.value or 0))
    initial = evidence.initial(least)
    beside = "" if initial is None or evidence.weights == "fresh" else f" ({number(initial.value)} at initialisation)"
    sets = " and ".join(f"heads {_numbers(heads)}" for heads in inside)
    # heads are joined by who is nearest to whom: along a chain of k steps angles add up
    angle = (max(map(len, inside)) - 1) * math.acos(cosine)
    lost = math.sin(min(angle, math.pi / 2))
    spare = tuple(head for heads in inside for head in heads[1:])
    merge = Intervention("merge-heads", stack, layer, groups=tuple(inside))
    # those that were alike from the start are left out: where an initialisation is known it is exceeded
    exceeded = evidence.weights != "fresh" and all(evidence.initial(row) is not None for row in alike)
    claim = (
        f"In {stack} layer {layer} {sets} write the same up to size: cosine {number(cosine)} or more, each with "
        f"another{beside}. Dropping {'heads' if len(spare) > 1 else 'head'} {_numbers(spare)} and multiplying the "
        f"columns of W_O of what is left "
        f"changes the sum by at most {number(100 * lost)} % of what was dropped."
    )
    return Suspicion(
        claim=claim,
        stack=stack,
        severity=Severity.WARN,
        layers=(layer,),
        heads=tuple((layer, head) for heads in inside for head in heads),
        comparisons=tuple(evidence.compared(row) for row in rows[:6]),
        tests=(
            Test(merge, "no effect", effect_limits()),
            Test(Intervention("zero-head", stack, layer, spare), "told"),
        ),
        exceeded=exceeded,
    )


def _numbers(numbers: set[int] | tuple[int, ...]) -> str:
    said = [str(one) for one in sorted(numbers)]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


FAILURE = Failure(
    name=NAME,
    title="Heads that write the same",
    means=(
        "What two heads add to the stream, A V W_O of each over all tokens, points the same way: the cosine is "
        "nearly 1. The layer then needs one of them. Dropping the other is free once the one that stays is scaled: "
        "for heads that write Y and cY, W_O of the first times 1 + c gives the same sum, exactly. Two duplicates "
        "that are silenced one at a time are another matter: half of what they write together is gone. Heads start "
        "apart (cosine near 0) and become alike by copying, by growing a model from a smaller one, or by losing what "
        "told them apart. This is not head ambiguity, which is a fact of shapes: an observer who sees the layer's "
        "output through few directions cannot tell the heads' shares apart, whatever they write; with the full "
        "output and a square invertible W_O everyone's share can be told."
    ),
    harmless=(
        "It costs parameters and time, never the function. Right after a model was grown by copying heads it is "
        "meant: training has to part them. On a batch with little variety (repeated words, random tokens) heads can "
        "write alike that do not on text."
    ),
    tested=(
        "All but one of the heads are dropped, and the one that stays is multiplied by what comes nearest to their "
        "sum: one number over all documents, by least squares, as multiplying its columns of W_O would be. This must "
        "change nothing, else the verdict is withdrawn. Beside it the heads are silenced without the scaling: that "
        "effect is told and decides nothing, for a duplicate takes half of the pair's output with it. Where heads "
        "cannot be merged the verdict rests on the cosine against the same model at its initialisation."
    ),
    refuted_by=(
        "The cosine between the heads falls below .98 on other text, or merging them has an effect there: pass a batch "
        "of it, with weights=True and verify=True."
    ),
    command="fullrank examine {model} --weights --verify",
    papers=("head_channel: Rank, Head-Channel Non-Identifiability, and Symmetry Breaking (arXiv 2604.23681)",),
    valid_for="any",
    look=_look,
)
