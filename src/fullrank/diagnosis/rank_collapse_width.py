"""Rank collapse in width: the longer the context, the smaller the differences between tokens that attention passes on.

Write the values as their mean and the rest, V = 1v̄ᵀ + V'. Rows of A sum to one, so the mean comes out as it went in,
A1v̄ᵀ = 1v̄ᵀ, whatever the context. The rest comes out as (I − J)AV', and `contrast_gain` is its size over that of V'.

Under the random-matrix law, rows of independent logits whose spread does not depend on T, A_ts = e^{a_ts} / Σ_r
e^{a_tr} with a ~ N(0, s²), σ² = e^{s²} − 1, full attention has E Σ_s A_ts² = (1 + σ²)/T and a mean row of energy 1/T:
the gain is σ/√T. The rows of causal attention are those of length t: over late queries, T/2 < t ≤ T, E Σ_s A_ts²
averages to 2 ln 2 (1 + σ²)/T, and the mean row c(s) = (2/T) ln(T / max(s, T/2)) has the energy 1.227/T: the gain is
√((0.159 + 1.386 σ²)/T). Both fall like T^{−1/2}; a head that keeps choosing its keys has the exponent 0. The law needs
values that know nothing of the logits; read from the same d directions they add about s²/d to the squared gain, which
therefore stops falling near T ≈ d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.over_contexts import NEEDS_LENGTHS, Growth, growths, span, suspected
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Severity

__all__ = ["FAILURE"]


def _look(evidence: Evidence) -> Looked:
    if not evidence.slopes:
        return Looked(unchecked=NEEDS_LENGTHS)
    found = growths(evidence, "contrast_gain", least=threshold("rank-collapse-width.rounding"))
    if not found:
        return Looked(
            unchecked="no layer's attention was seen with its values at two lengths, of two sequences or more, above "
            "the floor."
        )
    collapses = _like_random if evidence.weights == "trained" else _beyond_random
    suspicions = []
    for _, some in groupby(found, key=lambda one: (one.stack, one.part)):
        of_stack = list(some)
        fallen = [one for one in of_stack if collapses(one)]
        if len(fallen) >= threshold("rank-collapse-width.layers") * len(of_stack):
            suspicions.append(_suspicion(fallen, trained=evidence.weights == "trained"))
    contexts = found[0].contexts
    clear = (
        f"from {contexts[0]} to {contexts[-1]} tokens the differences between tokens that attention passes on go like "
        f"context^({span([one.together.value for one in found])}), layer by layer; {_at_first(found)}."
    )
    return Looked(tuple(suspicions), clear=clear)


def _at_first(growths: Sequence[Growth]) -> str:
    known = [value for one in growths if (value := one.together_at_first) is not None]
    return f"{span(known)} at its own initialisation" if known else "−0.50 for random attention"


def _like_random(one: Growth) -> bool:
    """Whether trained attention loses differences as fast as random attention does, and has few left."""
    falls = one.together.high < threshold("rank-collapse-width.share") * _reference(one)
    return falls and one.size(one.contexts[-1]) < threshold("rank-collapse-width.gain")


def _beyond_random(one: Growth) -> bool:
    """Whether fresh attention loses differences faster than random attention does."""
    faster = threshold("rank-collapse-width.fresh") * threshold("rank-collapse-width.random")
    return one.together.high < faster


def _reference(one: Growth) -> float:
    first = one.together_at_first
    random, least = threshold("rank-collapse-width.random"), threshold("rank-collapse-width.least")
    return random if first is None else min(first, least)


def _suspicion(fallen: Sequence[Growth], *, trained: bool) -> Suspicion:
    contexts = fallen[0].contexts
    exponents = span([one.together.value for one in fallen])
    last = max(one.size(contexts[-1]) for one in fallen)
    random = threshold("rank-collapse-width.random")
    return suspected(
        fallen,
        f"the differences between tokens shrink with the context while their mean comes through whole: like "
        f"context^({exponents}) from {contexts[0]} to {contexts[-1]} tokens (against {_at_first(fallen)}), to at most "
        f"{last:.2g} of what went in.",
        [one.compared(one.together, one.together_at_first, random) for one in fallen],
        severity=Severity.WARN if trained else Severity.NOTE,
        tested=trained,
        exceeded=all(one.together_at_first is not None for one in fallen),
    )


FAILURE = Failure(
    name="rank-collapse-width",
    title="Attention that evens tokens out as the context grows",
    means="Attention passes the mean of the values on whole and their differences from token to token reduced. Where "
    "it does not choose its keys, that reduction grows with the context, like the square root of its length: in a long "
    "context every query gets nearly the same.",
    harmless="A layer whose work is to average, such as one that reads the topic of a text, does so at every length. "
    "At default initialisation all layers fall like random attention, and train. Where the residual stream is large "
    "beside what attention writes, tokens stay apart without it.",
    tested="What the attention of these layers writes is replaced by its mean over the tokens (over what each query "
    "has seen, where attention is causal), in all of them at once: the suspicion holds where that changes nothing.",
    refuted_by="An effect of replacing what these layers write by its mean over the tokens; or a slope over longer "
    "contexts whose interval reaches up to 0.",
    command="fullrank examine {model} --contexts 256,1024,4096 --verify",
    papers=(
        "mind_the_gap: Mind the Gap: a Spectral Analysis of Rank Collapse and Signal Propagation in Attention Layers "
        "(arXiv 2410.07799)",
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
    ),
    valid_for="any",
    needs_structure=True,
    look=_look,
)
