"""Rank collapse in depth: from some layer on, the tokens of a sequence are one."""

from __future__ import annotations

import torch

from fullrank import metrics
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.single_direction import single_direction
from fullrank.diagnosis.sure import at_least, at_most
from fullrank.diagnosis.thresholds import effect_limits, threshold
from fullrank.diagnosis.unused_norms import unused_norms
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    clear: list[str] = []
    for stack in evidence.stacks:
        shares = _course(evidence, "token_energy", stack)
        if not shares or unused_norms(evidence):
            continue
        first = _first_collapsed(evidence, stack, shares)
        merged = None if first is None else _suspicion(evidence, stack, shares, first)
        found = _worse(merged, single_direction(evidence, stack))
        suspicions += found
        if not found:
            clear.append(f"{stack}: {_why_clear(evidence, stack, shares)}")
    if suspicions:
        return Looked(tuple(suspicions))
    if not clear:
        return Looked(unchecked=unused_norms(evidence) or "needs a stream of tokens, several to a sequence.")
    return Looked(clear=f"{'; '.join(clear)}.")


def _worse(merged: Suspicion | None, line: Suspicion | None) -> list[Suspicion]:
    """Tokens on one line are said where they come first, or where there is nothing else; and never instead of worse."""
    if line is None or (merged is not None and line.layers[0] >= merged.layers[0]):
        return [] if merged is None else [merged]
    if merged is None or merged.severity.rank <= line.severity.rank:
        return [line]
    return [merged] if line.severity is Severity.NOTE else [line, merged]


def _why_clear(evidence: Evidence, stack: str, shares: dict[int, Row]) -> str:
    if _one_from_the_start(evidence, stack, shares):
        return "what the first block is given is one token already, which is no matter of depth"
    lowest = min(shares.values(), key=lambda row: row.value or 0.0)
    said = f"{_percent(lowest.value)} of the stream's energy or more is particular to a token (layer {lowest.layer})"
    if (lowest.value or 0.0) >= threshold("rank-collapse-depth.token_energy"):
        return said
    return f"{said}; the rest is a bias or a few channels, is there at initialisation, or is undone further on"


def _course(evidence: Evidence, metric: str, stack: str) -> dict[int, Row]:
    return evidence.course(metric, stack, site="stream", part="out")


# ------------------------------------------------------------ where it begins


def _first_collapsed(evidence: Evidence, stack: str, shares: dict[int, Row]) -> int | None:
    """The first layer at the float floor, or from which on every layer is collapsed."""
    if _one_from_the_start(evidence, stack, shares):
        return None
    given = shares.get(0)
    floor = [layer for layer in shares if evidence.at_floor(stack, layer)]
    found: int | None = None
    for layer in sorted(shares, reverse=True):
        if layer == 0 or not _collapsed(evidence, stack, shares[layer], given):
            break
        found = layer
    for layer in sorted(floor):
        if _collapsed(evidence, stack, shares[layer], given):
            return layer if found is None else min(found, layer)
    return found


def _one_from_the_start(evidence: Evidence, stack: str, shares: dict[int, Row]) -> bool:
    """Whether what the first block is given is one token: queries of a decoder of detections begin at nothing."""
    nothing = (size := _course(evidence, "rms", stack).get(0)) is not None and size.value == 0
    return nothing or evidence.at_floor(stack, 0) or (0 in shares and shares[0].value == 0)


def _collapsed(evidence: Evidence, stack: str, row: Row, given: Row | None) -> bool:
    """Whether what is particular to tokens is less than can be carried, and was not so from the start."""
    channels = _course(evidence, "channel_entropy", stack).get(row.layer)
    if channels is not None and (channels.value or 0.0) < threshold("rank-collapse-depth.channel_entropy"):
        return False  # a few rogue dimensions are all of the energy: the others are not seen
    if not _fell(row, given) or not _fell(row, _reference(evidence, row)):
        return False
    if evidence.at_floor(stack, row.layer):
        return True
    if any(_carried(read) for read in _reads(evidence, stack, row.layer)):
        return False  # what the stream holds beside a large common part, the norm brings out
    if _alone(row):
        return True
    if at_most(row) >= threshold("rank-collapse-depth.token_energy"):
        return False
    if evidence.weights == "fresh":
        return True
    merged = _course(evidence, "similarity_standardized", stack).get(row.layer)
    return merged is not None and at_least(merged) > threshold("rank-collapse-depth.similarity_standardized")


def _fell(row: Row, before: Row | None) -> bool:
    """Whether a share is a small part of what it was; nothing speaks against it where that is not known."""
    limit = threshold("rank-collapse-depth.fall")
    return before is None or before.value is None or at_most(row) < limit * before.value


def _reference(evidence: Evidence, row: Row) -> Row | None:
    return None if evidence.weights == "fresh" else evidence.initial(row)


def _reads(evidence: Evidence, stack: str, layer: int) -> list[Row]:
    """What the next block reads of the stream, after its norm."""
    return [row for row in evidence.of_metric("token_energy", stack, site="read", part="out") if row.layer == layer]


def _carried(row: Row) -> bool:
    return "float floor" not in row.note and at_least(row) > threshold("rank-collapse-depth.token_energy")


# ------------------------------------------------------------ what is said


def _suspicion(evidence: Evidence, stack: str, shares: dict[int, Row], first: int) -> Suspicion:
    floor, last = evidence.at_floor(stack, first), max(shares)
    where = f"from layer {first} of {last} on" if first < last else f"after the last layer ({last})"
    severity, why = _severity(evidence, stack, first, shares)
    if floor:
        what = f"tokens of a sequence differ by rounding in {evidence.dtype} alone"
    else:
        row = shares[first]
        beside = [f"cosine {number(one.value)}" for one in (_course(evidence, "similarity", stack).get(first),) if one]
        merged = _course(evidence, "similarity_standardized", stack).get(first)
        if merged is not None:
            beside.append(f"{number(merged.value)} with features standardised")
        initial = _reference(evidence, row)
        if initial is not None:
            beside.append(f"{_percent(initial.value)} at initialisation")
        what = f"{_percent(row.value)} of its energy is particular to a token ({', '.join(beside)})"
    return Suspicion(
        f"In the {stack}'s stream {where}, {what}, against {_percent(_before(shares, first))} before the first "
        f"block{why}.",
        stack,
        severity,
        layers=tuple(layer for layer in sorted(shares) if layer >= first),
        comparisons=_comparisons(evidence, stack, shares, first),
        tests=_tests(evidence, stack, first) if severity is not Severity.NOTE else (),
        # that it fell below a share of the initialisation's is why it is here at all
        exceeded=_reference(evidence, shares[first]) is not None or (floor and _alone(shares[first])),
    )


def _before(shares: dict[int, Row], first: int) -> float | None:
    return shares[min(layer for layer in shares if layer <= first)].value


def _severity(evidence: Evidence, stack: str, first: int, shares: dict[int, Row]) -> tuple[Severity, str]:
    """How grave it is, and what speaks for less."""
    causal = bool(evidence.stacks[stack].get("causal"))
    floor = evidence.at_floor(stack, first)
    grave = floor and _alone(shares[first])  # the floor of a coarse dtype may be a share that another one carries
    if evidence.weights != "fresh":
        if evidence.unstructured:
            return Severity.NOTE, f"; on {evidence.unstructured}, tokens grow alike late in healthy trained models too"
        if first == max(shares) and not causal:
            return Severity.NOTE, "; at the end of a model with one answer per sequence, that is as it should be"
        return (Severity.FAIL if grave or causal else Severity.WARN), ""
    if grave:
        return Severity.FAIL, ""
    if floor:
        return Severity.NOTE, f"; {_percent(shares[first].value)} of its energy is particular to a token all the same"
    trains = "; such a model trains at small learning rates alone"
    return (Severity.WARN, "") if _alone(shares[max(shares)]) else (Severity.NOTE, trains)


def _alone(row: Row) -> bool:
    return at_most(row) < threshold("rank-collapse-depth.token_energy_alone")


def _comparisons(evidence: Evidence, stack: str, shares: dict[int, Row], first: int) -> tuple[Comparison, ...]:
    residual = _course(evidence, "residual", stack).get(first)
    if evidence.at_floor(stack, first) and residual is not None and residual.value is not None:
        floor = metrics.floor(getattr(torch, evidence.dtype))
        return (Comparison("residual", f"{stack} layer {first}", residual.value, residual.stderr, "dtype", floor),)
    found = []
    for metric in ("token_energy", "similarity", "similarity_standardized"):
        row = _course(evidence, metric, stack).get(first)
        null = evidence.null(stack, metric)
        if row is None or row.value is None:
            continue
        if _reference(evidence, row) is None and null is not None:
            found.append(Comparison(metric, f"{stack} layer {first}", row.value, row.stderr, "null", null))
        else:
            found.append(evidence.compared(row))
    return tuple(found)


def _tests(evidence: Evidence, stack: str, first: int) -> tuple[Test, ...]:
    """The sequences' means in the stream's place; of fresh weights none."""
    # A fresh model has no loss to lose, and the variance of its state shrinks with what is particular to tokens: the
    # share of it that the means take away is near 1 however little there is.
    if evidence.weights == "fresh":
        return ()
    worth = threshold("rank-collapse-depth.worth")
    limits = tuple((outcome, worth) for outcome, _ in effect_limits())
    return (Test(Intervention("stream-means", stack, first), "no effect", limits),)


def _percent(share: float | None) -> str:
    return number(share) if share is None else f"{number(100 * share)} %"


FAILURE = Failure(
    name="rank-collapse-depth",
    title="Tokens that merge over depth",
    means=(
        "From some layer on the residual stream holds the same vector for every token of a sequence: what was "
        "particular to a token is less than the next layers, the dtype or the gradient can carry. Attention then has "
        "nothing to choose between, and queries and keys get no gradient. Too weak a skip connection against averaging "
        "attention is the usual cause: deep post-norm stacks at initialisation, or branches without a skip."
    ),
    harmless=(
        "One cosine has three causes. A vector that all inputs share, often in a few channels, leaves what tokens "
        "differ in untouched: the energy shares and the cosine of standardised features tell. In the last layers of a "
        "model with one answer per sequence, tokens may merge: that is its answer. On shuffled or random tokens, "
        "cosines rise late in healthy trained models too. At initialisation, cosine .995 slows training and does not "
        "prevent it."
    ),
    tested=(
        "In trained weights the stream after the first collapsed layer is replaced by each sequence's mean token (what "
        "each query has seen, where attention is causal). The verdict holds where that changes next to nothing: no "
        "later layer uses what was particular to a token. Fresh weights are held against Gaussian tokens and the "
        "dtype's rounding. Tokens on one line are held against the directions that they had before the first block "
        "and at initialisation, and are a warning only where distances of neighbours, channels and the tokens without "
        "the first ones say so too: one huge token or channel has the same rank."
    ),
    refuted_by="Replacing the stream by its sequence means at that layer changes the loss.",
    command="fullrank examine {model} --verify",
    papers=(
        "dong: Attention is not all you need (arXiv 2103.03404)",
        "noci: Signal Propagation in Transformers: Theoretical Perspectives and the Role of Rank Collapse (arXiv "
        "2206.03126)",
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
        "token_geometry: The Geometry of Tokens in Internal Representations of Large Language Models (arXiv "
        "2501.10573)",
    ),
    valid_for="any",
    look=_look,
)
