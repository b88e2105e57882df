"""Context dilution: every key that the context adds is attended to, so that each counts for less.

`effective_keys`, the mean of exp H over queries, grows like context^a. For logits whose spread does not depend on the
context a = 1, whatever that spread and whether attention is full or causal: H = log n − s²/2 for n visible keys of
logits N(0, s²). A head that keeps choosing a few keys has a = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.over_contexts import NEEDS_LENGTHS, Growth, growths, span
from fullrank.diagnosis.thresholds import effect_limits, threshold
from fullrank.report.verdict import Severity

__all__ = ["FAILURE"]

_NO_LOSS = "loss by position: not measured."


def _look(evidence: Evidence) -> Looked:
    if evidence.weights == "unknown":
        return Looked(unchecked="every fresh model attends to all keys, and whether these weights are is not known.")
    if not evidence.slopes:
        return Looked(unchecked=NEEDS_LENGTHS)
    found = growths(evidence, "effective_keys")
    if not found:
        return Looked(unchecked="no layer's attention was seen at two lengths, of two sequences or more.")
    suspicions = []
    for (stack, part), some in groupby(found, key=lambda one: (one.stack, one.part)):
        of_stack = list(some)
        diluted = [one for one in of_stack if _dilutes(one)]
        if len(diluted) >= threshold("context-dilution.layers") * len(of_stack):
            suspicions.append(_suspicion(stack, part, diluted))
    slowest = [one.exponents[one.slowest].value for one in found]
    contexts = found[0].contexts
    clear = (
        f"from {contexts[0]} to {contexts[-1]} tokens every layer has heads whose effective keys grow slower than the "
        f"context: like context^({span(slowest)}), layer by layer; {_NO_LOSS}"
    )
    if suspicions:
        return Looked(tuple(suspicions), unchecked=_NO_LOSS)
    return Looked(clear=clear)


def _dilutes(one: Growth) -> bool:
    """Whether every head of a layer attends to all keys that are added."""
    return one.exponents[one.slowest].low > threshold("context-dilution.exponent")


def _suspicion(stack: str, part: str, diluted: Sequence[Growth]) -> Suspicion:
    layers = tuple(one.layer for one in diluted)
    contexts = diluted[0].contexts
    exponents = span([one.exponents[one.slowest].value for one in diluted])
    first = [value for one in diluted if (value := one.at_first(one.slowest)) is not None]
    there = f"{span(first)} at its own initialisation" if first else "+1.00 for random attention"
    keys = min(one.values[one.slowest][contexts[-1]] for one in diluted)
    where = f"{stack} layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    attention = "attention" if part == "self" else f"{part} attention"
    claim = (
        f"In {attention} of {where} every head attends to all the keys that the context adds: effective keys grow like "
        f"context^({exponents}) from {contexts[0]} to {contexts[-1]} tokens in the slowest head (against {there}), to "
        f"{keys:.3g} or more."
    )
    mean = Intervention("mean-head", stack, layers[0], part=part, also=layers[1:])
    test = Test(mean, expects="no effect", limits=effect_limits())
    return Suspicion(
        claim=claim,
        stack=stack,
        severity=Severity.WARN,
        layers=layers,
        comparisons=tuple(
            one.compared(one.exponents[one.slowest], one.at_first(one.slowest), threshold("context-dilution.random"))
            for one in diluted
        ),
        tests=(test,),
    )


FAILURE = Failure(
    name="context-dilution",
    title="Heads that spread over any context",
    means="Every head of a layer spreads its attention over all the keys there are, so that each key counts for less "
    "the longer the context: what one token says is lost among the rest.",
    harmless="A layer whose work is to average over the context, such as one that counts, or reads the topic of a "
    "text. Fresh weights attend to everything and learn to choose.",
    tested="What the attention of these layers writes is replaced by its mean over the tokens (over what each query "
    "has seen, where attention is causal), in all of them at once: the suspicion holds where that changes nothing.",
    refuted_by="An effect of replacing what these layers write by its mean over the tokens; or heads whose effective "
    "keys stop growing over longer contexts; or a loss that keeps falling with the position.",
    command="fullrank examine {model} --contexts 256,1024,4096 --verify",
    papers=(
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
        "log_context: Critical attention scaling in long-context transformers (arXiv 2510.05554)",
    ),
    valid_for="trained",
    look=_look,
)
