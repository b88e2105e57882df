"""Numerics: tokens that the dtype no longer tells apart, and how near its range the numbers come."""

from __future__ import annotations

import math

import torch

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sure import margin
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]

_MEDIAN = 0.6745  # of |x|, x normal with variance 1
_FLOAT8 = {"float8_e4m3": "float8_e4m3fn"}  # the name without its suffix


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    clear: list[str] = []
    for stack in evidence.stacks:
        merged, distinct = _merged(evidence, stack)
        suspicions += merged
        if distinct and not merged:
            clear.append(f"{stack}: {distinct}")
        for what, largest in (("entry of the stream", _largest(evidence, stack)), ("logit", _logits(evidence, stack))):
            if not largest:
                continue
            beyond = [found for dtype in _dtypes(evidence) if (found := _beyond(stack, what, largest, dtype))]
            suspicions += beyond
            if not beyond:
                top, _ = max(largest.values(), key=lambda one: one[0])
                clear.append(f"{stack}: {_said(what, top)} ({_margin(evidence, top)})")
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
        before = max(before, value)
        if before - value - margin(rows[layer]) > threshold("numerics.distinct_at_dtype"):
            lost[layer] = before - value
    if not rows:
        return [], ""
    least = min(rows.values(), key=lambda row: row.value or 0.0)
    if not lost:
        share = "all" if least.value == 1 else f"at least {number(100 * (least.value or 0.0))} % of the"
        return [], f"{share} pairs of tokens differ in {evidence.dtype}"
    first, worst = min(lost), max(lost, key=lambda layer: lost[layer])
    grave = lost[worst] > threshold("numerics.distinct_at_dtype.grave")
    return [
        Suspicion(
            f"In {stack} {layer_words(lost)} up to {number(100 * lost[worst])} % of the pairs of tokens that differed "
            f"before layer {first} are one number in {evidence.dtype}.",
            stack,
            Severity.FAIL if grave else Severity.WARN,
            layers=tuple(lost),
            comparisons=tuple(
                Comparison(
                    "distinct_at_dtype", f"{stack} layer {n}", rows[n].value or 0.0, rows[n].stderr, "dtype", 1.0
                )
                for n in lost
            ),
        )
    ], ""


# ------------------------------------------------------------ range


def _largest(evidence: Evidence, stack: str) -> dict[int, tuple[float, Row]]:
    """About how large the stream's largest entry is, by layer, and the row that says so."""
    found: dict[int, tuple[float, Row]] = {}
    sizes = evidence.course("rms", stack, site="stream", part="out", scope="all") or evidence.course(
        "rms", stack, site="stream", part="out"
    )
    for layer, row in evidence.course("max_to_median", stack, site="stream", part="out").items():
        size = sizes.get(layer)
        if size is None or size.value is None or row.value is None or row.scope == "samples":
            continue
        if math.isfinite(row.value):  # else more than half of the entries are 0, and their median says nothing
            found[layer] = (_largest_entry(size.value, row.value, _entries(evidence, stack)), row)
    return found


def _largest_entry(rms: float, max_to_median: float, entries: float) -> float:
    """The largest of N entries from their root mean square and the largest over the median, M."""
    # No row holds it. Were all entries but one normal with standard deviation σ, the median would be .6745 σ, the
    # largest a = .6745 M σ, and N rms² = (N − 1) σ² + a². Within a factor of two where a handful of massive activations
    # stand out, exact for none or one.
    ratio = _MEDIAN * max_to_median
    return rms * ratio / math.sqrt((entries - 1 + ratio**2) / entries) if math.isfinite(entries) else rms * ratio


def _entries(evidence: Evidence, stack: str) -> float:
    """Of one sequence; infinite where that is not known, which makes the largest entry a little too large."""
    told = evidence.about.get("input") or {}
    width = evidence.stacks[stack].get("width")
    if not (told.get("tokens") and told.get("sequences") and width):
        return math.inf
    return float(max(2, told["tokens"] / told["sequences"] * width))


def _logits(evidence: Evidence, stack: str) -> dict[int, tuple[float, Row]]:
    """The largest size of a logit that is known, by layer: of heads, the largest."""
    found: dict[int, tuple[float, Row]] = {}
    for row in evidence.of_metric("max_logit", stack, scope="all"):
        if row.value is not None and row.value > found.get(row.layer, (0.0,))[0]:
            found[row.layer] = (row.value, row)
    return found


def _dtypes(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys((evidence.dtype, *evidence.dtypes)))


def _range(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, _FLOAT8.get(dtype, dtype))).max)


def _beyond(stack: str, what: str, largest: dict[int, tuple[float, Row]], dtype: str) -> Suspicion | None:
    limit = _range(dtype)
    near = {layer: size for layer, (size, _) in largest.items() if size * threshold("numerics.margin") > limit}
    if not near:
        return None
    worst = max(near, key=lambda layer: near[layer])
    over = near[worst] > limit
    beside = f"{number(near[worst] / limit)} times" if over else f"{number(100 * near[worst] / limit)} % of"
    return Suspicion(
        f"In {stack} {layer_words(near)} {_said(what, near[worst])} (layer {worst}), {beside} the largest number of "
        f"{dtype}, {number(limit)}.",
        stack,
        Severity.FAIL if over and not dtype.startswith("float8") else Severity.WARN,
        layers=tuple(near),
        comparisons=tuple(
            Comparison(row.metric, f"{stack} layer {layer}", row.value or 0.0, row.stderr, "dtype", limit)
            for layer, (_, row) in largest.items()
            if layer in near
        ),
    )


def _said(what: str, size: float) -> str:
    return f"the largest {what} is {'about ' if what != 'logit' else ''}{number(size)}"


def _margin(evidence: Evidence, size: float) -> str:
    narrowest = min(_dtypes(evidence), key=_range)
    return f"{narrowest} holds {number(_range(narrowest) / size if size else math.inf)} times as much"


FAILURE = Failure(
    name="numerics",
    title="Too little precision or range",
    means=(
        "Either tokens that were different have become one number to the last bit, and nothing can tell them apart "
        "again; or the stream's entries, or attention's logits, come near the largest number that the run's dtype, or "
        "one that was asked about, can hold: then another batch gives infinities."
    ),
    harmless=(
        "Equal words in a model without positions are equal from the start; only pairs that an earlier layer had "
        "count. Beyond the range of float8 is no fault where tensors are scaled before they are cast. Massive "
        "activations of a few entries belong to how trained decoders use attention sinks."
    ),
    tested=(
        "From the numbers alone: the share of pairs of tokens that still differ, bit by bit, is held against that of "
        "earlier layers; the stream's largest entry, estimated from its root mean square and the ratio of its largest "
        "to its median entry, and the largest logit are held against the range of the run's dtype and of those asked "
        "about. What stays inside a block (the width of the MLP, a branch before its norm) is not seen."
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
