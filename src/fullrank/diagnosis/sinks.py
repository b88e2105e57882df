"""Attention sinks: where they are, what they are needed for, and when they rest on the wrong token."""

from __future__ import annotations

from collections import Counter

from fullrank.diagnosis.dtype_range import dtypes_of, largest_number
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.kinds import PART, Place, in_words
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sink_keys import massive_at_sinks, massive_beyond, sink_positions, sinks_of
from fullrank.diagnosis.sure import above
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
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
        sinks = sinks_of(evidence, stack)
        if sinks:
            suspicions.append(_suspicion(evidence, stack, sinks, len(masses)))
            beyond = _beyond(evidence, stack)
            suspicions += [beyond] if beyond is not None else []
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


# ---------------------------------------------------------------- where attention rests


def _suspicion(evidence: Evidence, stack: str, sinks: dict[Place, Row], all_of: int) -> Suspicion:
    positions = sink_positions(evidence, stack)
    first = [place for place, position in positions.items() if position == 0]
    few = threshold(f"{NAME}.few") * all_of
    causal = bool(evidence.stacks[stack].get("causal"))
    layers = sorted({layer for layer, _ in sinks})
    missing = causal and evidence.bos is False and len(first) >= few
    claim = f"{len(sinks)} of {all_of} heads of {stack}, in {layer_words(layers)}, give {_share(sinks)} to one key: "
    if missing:
        claim += (
            f"in {len(first)} of them the first token, which is content: the tokenizer has a token for the beginning, "
            "and the batch does not begin with it."
        )
    else:
        claim += f"{_where(positions, evidence)}; such a head adds almost the same to every token."
    said, massive = _massive(evidence, stack)
    strongest = sorted(sinks, key=lambda place: -float(sinks[place].value or 0))
    return Suspicion(
        claim=claim + said,
        stack=stack,
        severity=Severity.WARN if missing else Severity.NOTE,
        layers=tuple(layers),
        heads=tuple(sorted(first if missing else sinks)),
        comparisons=(*(evidence.compared(sinks[place]) for place in strongest[:4]), *massive),
        tests=(_hidden(stack, first, 0),) if first else (),
        exceeded=missing and sum(_learned(evidence, sinks[place]) for place in first) >= few,
    )


def _learned(evidence: Evidence, mass: Row) -> bool:
    """Whether a head rests on its key by far more than the same head did at initialisation."""
    initial = evidence.initial(mass)
    return initial is not None and above(mass, threshold(f"{NAME}.over_initialisation") * float(initial.value or 0))


def _massive(evidence: Evidence, stack: str) -> tuple[str, tuple[Comparison, ...]]:
    """A sentence and the number for the largest massive activation that a sink's key holds, where there is one."""
    massive = massive_at_sinks(evidence, stack)
    if not massive:
        return "", ()
    worst = max(massive, key=lambda layer: massive[layer].value or 0.0)
    ratio = evidence.course("max_to_median", stack, site="stream", part="out")[worst].value
    said = (
        f" Its state holds the stream's largest entry in {layer_words(massive)}, {number(massive[worst].value)} after "
        f"layer {worst}, {number(ratio)} times the median."
    )
    return said, (evidence.compared(massive[worst]),)


def _hidden(stack: str, places: list[Place], position: int) -> Test:
    """One test for all layers that have the sink: heads without one hardly look there."""
    layers = sorted({layer for layer, _ in places})
    done = Intervention("mask-sink", stack, layers[0], position=position, also=tuple(layers[1:]))
    return Test(done, "told")


def _share(sinks: dict[Place, Row]) -> str:
    values = sorted(float(row.value or 0) for row in sinks.values())
    low, high = f"{values[0]:.2g}", f"{values[-1]:.2g}"
    return f"{low} of their attention" if low == high else f"{low} to {high} of their attention"


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


def _beyond(evidence: Evidence, stack: str) -> Suspicion | None:
    """Massive activations of a sink's key that the run's dtype or a named one cannot hold."""
    by_dtype = {name: found for name in dtypes_of(evidence) if (found := massive_beyond(evidence, stack, name))}
    if not by_dtype:
        return None
    beyond = {layer: row for found in by_dtype.values() for layer, row in sorted(found.items())}
    worst = max(beyond, key=lambda layer: beyond[layer].value or 0.0)
    limits = " and ".join(f"{name} (at most {number(largest_number(name))})" for name in by_dtype)
    return Suspicion(
        claim=f"The key of {stack} that heads rest on holds massive activations in {layer_words(beyond)}: the largest "
        f"entry, {number(beyond[worst].value)} after layer {worst}, is more than {limits} can hold.",
        stack=stack,
        severity=Severity.WARN,
        layers=tuple(sorted(beyond)),
        comparisons=tuple(
            Comparison(
                row.metric, f"{stack} layer {row.layer}", row.value or 0.0, row.stderr, "dtype", largest_number(name)
            )
            for name, found in by_dtype.items()
            for row in found.values()
        ),
        exceeded=True,
    )


FAILURE = Failure(
    name=NAME,
    title="Attention that rests on one key",
    means=(
        "Many heads give most of their attention to one key, most often the first token, whatever the query. A "
        "softmax must put its weight somewhere; a head that has nothing to add puts it on a key whose value is "
        "small. Such a head is a no-op that the model needs: taking the sink away makes it average over content "
        "instead. The key that serves is the token that every training sequence began with; a batch without it makes "
        "a token of content serve, which the model has not learned to do. The sink's state often carries massive "
        "activations, a few entries a thousand times the others, and these are what a narrow dtype cannot hold. Large "
        "entries of other tokens are a matter of `numerics`."
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
