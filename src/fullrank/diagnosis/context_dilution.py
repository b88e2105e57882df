"""Context dilution: every key that the context adds is attended to, so that each counts for less.

`effective_keys`, the mean of exp H over queries, grows like context^a. For logits whose spread does not depend on the
context a = 1, whatever that spread and whether attention is full or causal: H = log n − s²/2 for n visible keys of
logits N(0, s²). A head that keeps choosing a few keys has a = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.over_contexts import NEEDS_LENGTHS, Growth, attention_of, growths, signed, span, suspected
from fullrank.diagnosis.thresholds import threshold

__all__ = ["FAILURE"]


def _look(evidence: Evidence) -> Looked:
    if evidence.weights == "unknown":
        return Looked(unchecked="every fresh model attends to all keys, and whether these weights are is not known.")
    if not evidence.slopes:
        return Looked(unchecked=NEEDS_LENGTHS)
    found = growths(evidence, "effective_keys")
    if not found:
        return Looked(unchecked="no layer's attention was seen at two lengths, of two sequences or more.")
    suspicions, of_use, losses = [], [], {}
    for (stack, _), some in groupby(found, key=lambda one: (one.stack, one.part)):
        of_stack = list(some)
        diluted = [one for one in of_stack if _dilutes(one)]
        loss = losses[stack] = _loss_of(evidence, stack)
        if len(diluted) < threshold("context-dilution.layers") * len(of_stack):
            continue
        if loss.falls:
            of_use.append(f"{attention_of(diluted)} reads all the keys that are added, and they are of use")
        else:
            suspicions.append(_suspicion(diluted, loss))
    said = "; ".join(dict.fromkeys(loss.words for loss in losses.values()))
    if suspicions:
        unknown = [loss.words for loss in losses.values() if not loss.known]
        return Looked(tuple(suspicions), unchecked=f"{'; '.join(dict.fromkeys(unknown))}." if unknown else "")
    first, *_, last = found[0].contexts
    if of_use:
        return Looked(clear=f"from {first} to {last} tokens {'; '.join(of_use)}: {said}.")
    slowest = [one.exponents[one.slowest].value for one in found]
    return Looked(
        clear=f"from {first} to {last} tokens most layers have heads whose effective keys grow slower than the "
        f"context: like context^({span(slowest)}), layer by layer; {said}."
    )


class _Loss(NamedTuple):
    """The loss by position: what it says of what is added to the context, and whether it falls."""

    words: str
    known: bool = False
    falls: bool = False


def _loss_of(evidence: Evidence, stack: str) -> _Loss:
    slope = next((s for s in evidence.slopes if (s.metric, s.stack) == ("token_loss", stack)), None)
    if slope is None:
        return _Loss("the loss by position is not known: this attention also looks ahead, or the model returns no loss")
    if slope.per_doubling is None or slope.low is None or slope.high is None:
        notes = (r.note for r in evidence.rows if (r.metric, r.stack, r.value) == ("token_loss", stack, None))
        return _Loss(f"loss by position: not known, {next(notes, slope.note)}")
    change, low, high = (signed(value, ".2g") for value in (slope.per_doubling, slope.low, slope.high))
    words = f"the loss by position changes by {change} nats per doubling of the context (95 %: {low} to {high})"
    return _Loss(words, known=True, falls=slope.high < -threshold("context-dilution.loss"))


def _dilutes(one: Growth) -> bool:
    """Whether every head of a layer attends to all keys that are added."""
    return one.exponents[one.slowest].low > threshold("context-dilution.exponent")


def _suspicion(diluted: Sequence[Growth], loss: _Loss) -> Suspicion:
    contexts = diluted[0].contexts
    slowest = [(one, one.exponents[one.slowest], one.at_first(one.slowest)) for one in diluted]
    first = [initial for _, _, initial in slowest if initial is not None]
    there = f"{span(first)} at its own initialisation" if first else "+1.00 for random attention"
    keys = min(one.values[one.slowest][contexts[-1]] for one in diluted)
    random = threshold("context-dilution.random")
    return suspected(
        diluted,
        f"every head attends to all the keys that the context adds: effective keys grow like "
        f"context^({span([exponent.value for _, exponent, _ in slowest])}) from {contexts[0]} to {contexts[-1]} tokens "
        f"in the slowest head (against {there}), to {keys:.3g} or more{f', and {loss.words}' if loss.known else ''}.",
        [one.compared(exponent, initial, random) for one, exponent, initial in slowest],
        exceeded=all(
            initial is not None and exponent.low > threshold("context-dilution.exponent") * initial
            for _, exponent, initial in slowest
        ),
    )


FAILURE = Failure(
    name="context-dilution",
    title="Heads that spread over any context",
    means="Every head of a layer spreads its attention over all the keys there are, so that each key counts for less "
    "the longer the context: what one token says is lost among the rest.",
    harmless="A layer whose work is to average over the context, such as one that counts, or reads the topic of a "
    "text. Fresh weights attend to everything and learn to choose. Where the loss keeps falling with the position, "
    "what the context adds is of use, however it is read: nothing is suspected there.",
    tested="What the attention of these layers writes is replaced by its mean over the tokens (over what each query "
    "has seen, where attention is causal), in all of them at once: the suspicion holds where that changes nothing.",
    refuted_by="An effect of replacing what these layers write by its mean over the tokens; heads whose effective "
    "keys stop growing over longer contexts; or a loss that keeps falling with the position.",
    command="fullrank examine {model} --contexts 256,1024,4096 --verify",
    papers=(
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
        "log_context: Critical attention scaling in long-context transformers (arXiv 2510.05554)",
    ),
    valid_for="trained",
    needs_structure=True,
    look=_look,
)
