"""Attention sinks: where they are, what they are needed for, and when they rest on the wrong token."""

from __future__ import annotations

import math
from collections import Counter

import torch

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.kinds import LATE, PART, Place, heads_of, in_words
from fullrank.diagnosis.sure import above
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.table import Row

__all__ = ["FAILURE"]

NAME = "sinks"


def _look(evidence: Evidence) -> Looked:
    suspicions, said, unknown = [], [], []
    for stack in evidence.stacks:
        masses = evidence.heads("sink_mass", stack, site="attention", part=PART)
        if not masses:
            unknown.append(stack)
            continue
        sinks = _sinks(evidence, stack, masses)
        if sinks:
            suspicions.append(_suspicion(evidence, stack, sinks, len(masses)))
            massive = _massive(evidence, stack)
            suspicions += [massive] if massive is not None else []
        else:
            most = max(float(row.value or 0) for row in masses.values())
            said.append(f"{stack}: no key holds more than {most:.2g} of a head's attention")
    if suspicions:
        return Looked(tuple(suspicions))
    if unknown:
        return Looked(unchecked=f"attention of {', '.join(unknown)} was not seen.")
    if not said:
        return Looked(unchecked="there is no attention.")
    return Looked(clear="; ".join(said) + ".")


def _sinks(evidence: Evidence, stack: str, masses: dict[Place, Row]) -> dict[Place, Row]:
    heads = heads_of(evidence, stack)
    found = {}
    for place, row in masses.items():
        if place not in heads:
            continue
        uniform = math.exp(-heads[place].log_keys)
        if above(row, max(threshold(f"{NAME}.mass"), threshold(f"{NAME}.over_uniform") * uniform)):
            found[place] = row
    return found


# ---------------------------------------------------------------- where attention rests


def _suspicion(evidence: Evidence, stack: str, sinks: dict[Place, Row], all_of: int) -> Suspicion:
    rows = evidence.heads("sink_position", stack, site="attention", part=PART)
    positions = {place: int(rows[place].value or 0) for place in sinks if place in rows}
    first = [place for place, position in positions.items() if position == 0]
    causal = bool(evidence.stacks[stack].get("causal"))
    layers = sorted({layer for layer, _ in sinks})
    missing = causal and evidence.bos is False and len(first) >= threshold(f"{NAME}.few") * all_of
    claim = f"{len(sinks)} of {all_of} heads of {stack}, in {_layers(layers)}, give {_share(sinks)} to one key: "
    if missing:
        claim += (
            f"in {len(first)} of them the first token, which is content: the tokenizer has a token for the beginning, "
            "and the batch does not begin with it."
        )
    else:
        claim += f"{_where(positions, evidence)}; such a head adds almost the same to every token."
    tests = (_hidden(stack, first, 0),) if first else ()
    strongest = sorted(sinks, key=lambda place: -float(sinks[place].value or 0))
    return Suspicion(
        claim=claim,
        stack=stack,
        severity=Severity.WARN if missing else Severity.NOTE,
        layers=tuple(layers),
        heads=tuple(sorted(first if missing else sinks)),
        comparisons=tuple(evidence.compared(sinks[place]) for place in strongest[:4]),
        tests=tests,
    )


def _hidden(stack: str, places: list[Place], position: int) -> Test:
    """One test for all layers that have the sink: heads without one hardly look there."""
    layers = sorted({layer for layer, _ in places})
    done = Intervention("mask-sink", stack, layers[0], position=position, also=tuple(layers[1:]))
    return Test(done, "told")


def _share(sinks: dict[Place, Row]) -> str:
    values = sorted(float(row.value or 0) for row in sinks.values())
    low, high = f"{values[0]:.2g}", f"{values[-1]:.2g}"
    return f"{low} of their attention" if low == high else f"{low} to {high} of their attention"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    together = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
    return f"layers {layers[0]} to {layers[-1]}" if together else f"layers {', '.join(map(str, layers))}"


def _where(positions: dict[Place, int], evidence: Evidence) -> str:
    if not positions:
        return "which one was not seen"
    counts = Counter(positions.values())
    begin = ", the token for the beginning" if evidence.bos else ""
    said = [f"the first token{begin}, in {counts.pop(0)} heads"] if 0 in counts else []
    if counts:
        usual, times = counts.most_common(1)[0]
        places = sorted(place for place, position in positions.items() if position)
        said.append(
            f"the key at position {usual} in {in_words(places)}"
            if len(counts) == 1
            else f"later keys, which differ between heads or sequences, in {sum(counts.values())} heads "
            f"(most often position {usual}, in {times})"
        )
    return " and ".join(said)


# ---------------------------------------------------------------- what a dtype can hold


def _massive(evidence: Evidence, stack: str) -> Suspicion | None:
    """The largest activation beside a sink, where it is massive and out of range of the run's or a named dtype."""
    worst: tuple[float, Row] | None = None
    entries = _entries(evidence, stack)
    sizes = evidence.course("rms", stack, site="stream", part="out", scope="all")
    for layer, row in evidence.course("max_to_median", stack, site="stream", part="out").items():
        largest = _largest(entries, row, sizes.get(layer))
        if largest is not None and above(row, threshold(f"{NAME}.massive")) and (not worst or largest > worst[0]):
            worst = largest, row
    names = dict.fromkeys((evidence.dtype, *evidence.dtypes))
    held = {name: limit for name in names if (limit := _range(name)) is not None}
    if worst is None or not (short := {name: limit for name, limit in held.items() if worst[0] > limit}):
        return None
    largest, row = worst
    where = f"{stack} layer {row.layer}"
    beyond = ", ".join(f"{name} (at most {limit:.3g})" for name, limit in short.items())
    return Suspicion(
        claim=f"Massive activations after layer {row.layer} of {stack}: the largest is about {largest:.3g}, "
        f"{row.value:.3g} times the median, which {beyond} cannot hold.",
        stack=stack,
        severity=Severity.WARN,
        layers=(row.layer,),
        comparisons=(
            evidence.compared(row),
            *(Comparison("max_to_median", where, largest, None, "dtype", limit) for limit in short.values()),
        ),
    )


def _largest(entries: float, ratio: Row, size: Row | None) -> float | None:
    """About how large the largest of N entries is, from its ratio r to the median and the root mean square.

    If the other entries are Gaussian their median is .674 of their root mean square, so that N rms² = max² + 2.2 N
    (max/r)². Where k entries are that large, this is √k too much at most.

    Args:
        entries: N, of one sequence.
        ratio: of the largest entry to the median.
        size: root mean square of the same state.

    Returns:
        The estimate; None where a number is missing.
    """
    if size is None or not size.value or not ratio.value or not entries:
        return None
    return size.value * math.sqrt(entries / (1 + 2.2 * entries / ratio.value**2))


def _entries(evidence: Evidence, stack: str) -> float:
    """Of one sequence: the width times the keys that a head sees, of which the late half sees three quarters."""
    seen = [(head.log_keys, head.entropy.scope == LATE) for head in heads_of(evidence, stack).values()]
    tokens = max((math.exp(log_keys) * (4 / 3 if late else 1) for log_keys, late in seen), default=0.0)
    return tokens * float(evidence.stacks[stack].get("width") or 0)


def _range(dtype: str) -> float | None:
    found = getattr(torch, dtype, getattr(torch, f"{dtype}fn", None))  # float8_e4m3 is called float8_e4m3fn
    return torch.finfo(found).max if isinstance(found, torch.dtype) and found.is_floating_point else None


FAILURE = Failure(
    name=NAME,
    title="Attention that rests on one key",
    means=(
        "Many heads give most of their attention to one key, most often the first token, whatever the query. A "
        "softmax must put its weight somewhere; a head that has nothing to add puts it on a key whose value is "
        "small. Such a head is a no-op that the model needs: taking the sink away makes it average over content "
        "instead. The key that serves is the token that every training sequence began with; a batch without it makes "
        "a token of content serve, which the model has not learned to do. The sink's state often carries massive "
        "activations, a few entries a thousand times the others, and these are what a narrow dtype cannot hold."
    ),
    harmless=(
        "Nearly always: most trained decoders have sinks on their first token, encoders on [CLS] or a delimiter, "
        "vision models on a register or a patch without content. It is a warning only where the model's token for "
        "the beginning is missing from the batch, or where an activation does not fit the dtype. GPT-2 was trained "
        "on texts cut anywhere, and takes any first token for its sink."
    ),
    tested=(
        "The key is hidden from all other queries in every layer that has the sink, and the rest of each row is "
        "renormalised. The effect is what hiding it costs; it is told, and decides nothing."
    ),
    refuted_by=(
        "The batch with the tokenizer's token for the beginning put in front has the same loss on the same tokens; or "
        "the model was trained without that token."
    ),
    command="fullrank examine {model} --verify",
    papers=(
        "oversmoothing_fixes: When Attention Sink Emerges in Language Models (arXiv 2410.10781)",
        "oversmoothing_fixes: Gated Attention for Large Language Models (arXiv 2505.06708)",
        "oversmoothing_fixes: Softpick: No Attention Sink, No Massive Activations (arXiv 2504.20966)",
    ),
    valid_for="any",
    look=_look,
)
