"""A test that is only told confirms nothing: a reference must be exceeded for anything graver than a note."""

from __future__ import annotations

import pytest

from fullrank.diagnosis import Failure, Intervention, Looked, Suspicion, Test
from fullrank.report.verdict import Comparison, Effect, Severity

DONE = Intervention("mask-sink", "decoder", 1)
WORDS = dict.fromkeys(("title", "means", "harmless", "tested", "refuted_by", "command"), "")


@pytest.mark.parametrize("change", [0.0, 5.0, -5.0])
@pytest.mark.parametrize(("exceeded", "grave"), [(False, Severity.NOTE), (True, Severity.WARN)])
def test_what_is_only_told_neither_confirms_nor_refutes(change, exceeded, grave):
    # the reference is there either way: it must also be beyond
    compared = Comparison("sink_mass", "decoder layer 1", 0.9, against="initialisation", expected=0.1)
    tests = (Test(DONE, "told"),)
    suspicion = Suspicion("c", "decoder", Severity.WARN, comparisons=(compared,), tests=tests, exceeded=exceeded)
    failure = Failure("f", **WORDS, papers=(), valid_for="any", look=lambda evidence: Looked((suspicion,)))
    effect = Effect(DONE.words, "loss", change, change - 0.1, change + 0.1, 8, 3.0)
    verdict = failure.verdict(suspicion, (effect,), "m")
    assert verdict is not None
    assert (verdict.severity, verdict.effects) == (grave, (effect,))
    untested = failure.verdict(suspicion, None, "m")
    assert untested is not None
    assert untested.severity is Severity.NOTE


def test_a_told_test_beside_another_leaves_the_other_to_decide():
    limits = (("loss", 0.01),)
    tests = (Test(DONE, "told"), Test(DONE, "no effect", limits))
    suspicion = Suspicion("c", "decoder", Severity.WARN, tests=tests)
    failure = Failure("f", **WORDS, papers=(), valid_for="any", look=lambda evidence: Looked((suspicion,)))
    free, dear = (Effect(DONE.words, "loss", x, x - 0.001, x + 0.001, 8, 3.0) for x in (0.0, 1.0))
    confirmed = failure.verdict(suspicion, (dear, free), "m")
    assert confirmed is not None
    assert confirmed.severity is Severity.WARN
    assert failure.verdict(suspicion, (free, dear), "m") is None
