"""Numerics: tokens that the dtype no longer tells apart, and how near its range the numbers come."""

from __future__ import annotations

import math

from fullrank.diagnosis.dtype_range import dtypes_of, largest_number
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sink_keys import massive_beyond
from fullrank.diagnosis.sure import below
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]

_ENTRY, _LOGIT = "the largest entry of the stream is", "the largest logit of a sequence is on average"


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    clear: list[str] = []
    for stack in evidence.stacks:
        merged, distinct = _merged(evidence, stack)
        suspicions += merged
        if distinct and not merged:
            clear.append(f"{stack}: {distinct}")
        for what, largest in ((_ENTRY, _entries(evidence, stack)), (_LOGIT, _logits(evidence, stack))):
            beyond = [found for dtype in dtypes_of(evidence) if (found := _beyond(evidence, stack, what, dtype))]
            suspicions += beyond
            told = {row.layer for dtype in dtypes_of(evidence) for row in _of_sinks(evidence, stack, what, dtype)}
            rest = [row.value or 0.0 for layer, row in largest.items() if layer not in told]
            if rest and not beyond:
                where = "but for layers where it is that of a key that attention rests on, " if told else ""
                clear.append(f"{stack}: {where}{what} {number(max(rest))} ({_margin(evidence, max(rest))})")
            elif told and not beyond:
                clear.append(f"{stack}: {what} that of a key that attention rests on")
    if not suspicions and not clear:
        return Looked(unchecked="needs a stream of several tokens, or of several samples, above the float floor.")
    return Looked(tuple(suspicions), clear=f"{'; '.join(clear)}.")


# ------------------------------------------------------------ tokens that are one number


def _merged(evidence: Evidence, stack: str) -> tuple[list[Suspicion], str]:
    """Layers that lost pairs which an earlier one had (equal words without positions are equal from the start)."""
    rows = {
        layer: row
        for layer, row in evidence.course("distinct_at_dtype", stack, site="stream", part="out").items()
        if not evidence.at_floor(stack, layer)
    }
    lost: dict[int, float] = {}
    before = 0.0
    for layer in sorted(rows):
        value = rows[layer].value or 0.0
        if below(rows[layer], before * (1 - threshold("numerics.distinct_at_dtype"))):
            lost[layer] = 1 - value / before
        before = max(before, value)
    if not rows:
        return [], ""
    least = min(rows.values(), key=lambda row: row.value or 0.0)
    if not lost:
        share = "all" if least.value == 1 else f"at least {number(100 * (least.value or 0.0))} % of the"
        return [], f"{share} pairs of tokens differ in {evidence.dtype}"
    worst = max(lost, key=lambda layer: lost[layer])
    grave = lost[worst] > threshold("numerics.distinct_at_dtype.grave")
    return [
        Suspicion(
            f"In {stack} {layer_words(lost)} up to {number(100 * lost[worst])} % of the pairs of tokens that differed "
            f"before are one number in {evidence.dtype}.",
            stack,
            Severity.FAIL if grave else Severity.WARN,
            layers=tuple(lost),
            comparisons=tuple(
                Comparison(
                    "distinct_at_dtype", f"{stack} layer {n}", rows[n].value or 0.0, rows[n].stderr, "dtype", 1.0
                )
                for n in lost
            ),
            exceeded=True,
        )
    ], ""


# ------------------------------------------------------------ range


def _entries(evidence: Evidence, stack: str) -> dict[int, Row]:
    """The stream's largest entry, by layer."""
    return evidence.course("max_abs", stack, site="stream", part="out")


def _logits(evidence: Evidence, stack: str) -> dict[int, Row]:
    """The largest logit of any head, by layer."""
    found: dict[int, Row] = {}
    for row in evidence.of_metric("max_logit", stack, scope="all"):
        if row.layer not in found or (row.value or 0.0) > (found[row.layer].value or 0.0):
            found[row.layer] = row
    return found


def _of_sinks(evidence: Evidence, stack: str, what: str, dtype: str) -> list[Row]:
    """Entries of which `sinks` tells."""
    return list(massive_beyond(evidence, stack, dtype).values()) if what == _ENTRY else []


def _beyond(evidence: Evidence, stack: str, what: str, dtype: str) -> Suspicion | None:
    """Layers that are beyond a dtype's range; where there is none, those that are near it."""
    limit = largest_number(dtype)
    told = {row.layer for row in _of_sinks(evidence, stack, what, dtype)}
    rows = _entries(evidence, stack) if what == _ENTRY else _logits(evidence, stack)
    sizes = {layer: row.value or 0.0 for layer, row in rows.items() if layer not in told}
    near = {layer: size for layer, size in sizes.items() if size * threshold("numerics.margin") > limit}
    over = {layer: size for layer, size in near.items() if size > limit}
    found = over or near
    if not found:
        return None
    worst = max(found, key=lambda layer: found[layer])
    beside = f"{number(found[worst] / limit)} times" if over else f"{number(100 * found[worst] / limit)} % of"
    return Suspicion(
        f"In {stack} {layer_words(found)} {what} {number(found[worst])} (layer {worst}), {beside} the largest number "
        f"of {dtype}, {number(limit)}.",
        stack,
        Severity.FAIL if _certain(evidence, what, found[worst], dtype) else Severity.WARN,
        layers=tuple(found),
        comparisons=tuple(
            Comparison(rows[n].metric, f"{stack} layer {n}", sizes[n], rows[n].stderr, "dtype", limit) for n in found
        ),
        exceeded=True,  # the range, or the margin to it
    )


def _certain(evidence: Evidence, what: str, size: float, dtype: str) -> bool:
    """Whether a run in that dtype cannot stay finite."""
    if dtype == evidence.dtype or dtype.startswith("float8"):
        return False  # this run stayed finite; tensors are scaled before they are cast to float8
    return what == _ENTRY and size > threshold("numerics.over") * largest_number(dtype)  # kernels keep logits wider


def _margin(evidence: Evidence, size: float) -> str:
    narrowest = min(dtypes_of(evidence), key=largest_number)
    return f"{narrowest} holds {number(largest_number(narrowest) / size if size else math.inf)} times as much"


FAILURE = Failure(
    name="numerics",
    title="Too little precision or range",
    means=(
        "Either tokens that were different have become one number to the last bit, and nothing can tell them apart "
        "again; or the stream's entries, or attention's logits, come near the largest number that the run's dtype, or "
        "one that was asked about, can hold: then another batch gives infinities. Massive activations of the key that "
        "attention rests on are told by `sinks` where they do not fit."
    ),
    harmless=(
        "Equal words in a model without positions are equal from the start; only pairs that an earlier layer had "
        "count. Beyond the range of float8 is no fault where tensors are scaled before they are cast, nor are "
        "logits where the kernel keeps them in float32, as fused ones do. A run that stayed finite is no failure, "
        "however near it came."
    ),
    tested=(
        "From the numbers alone: the share of pairs of tokens that still differ, bit by bit, is held against that of "
        "earlier layers; the largest entry of the stream and the largest logit are held against the range of the "
        "run's dtype and of those asked about. What stays inside a block (the width of the MLP, a branch before its "
        "norm) is not seen."
    ),
    refuted_by="A run in that dtype, on documents of the kind that the model is for, stays finite.",
    command="fullrank examine {model} --dtype float32",
    papers=(
        "oversmoothing_fixes: Massive Activations in Large Language Models (arXiv 2402.17762)",
        "wu_masks_layernorm: On the Role of Attention Masks and LayerNorm (arXiv 2405.18781)",
    ),
    valid_for="any",
    look=_look,
)
