"""Context dilution: found where every head of half the layers attends to all the keys that the context adds."""

import pytest
from grown import grown

from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.context_dilution import FAILURE
from fullrank.report.verdict import Severity

METRIC = "effective_keys"
ALL, SOME = [1.0, 0.97], [1.0, 0.4]


def look(exponents, **options):
    return FAILURE.look(grown(METRIC, exponents, **({"size": 100.0} | options)))


def test_layers_all_of_whose_heads_attend_to_every_key_are_named_and_no_others():
    looked = look({1: ALL, 2: SOME, 3: ALL, 4: SOME})
    (suspicion,) = looked.suspicions
    assert (suspicion.layers, suspicion.severity) == ((1, 3), Severity.WARN)
    assert "context^(+0.97) from 256 to 4096 tokens" in suspicion.claim
    assert [(one.value, one.against, one.expected) for one in suspicion.comparisons] == [(0.97, "null", 1.0)] * 2
    (test,) = suspicion.tests
    assert (test.intervention.kind, test.intervention.layer, test.intervention.also) == ("mean-head", 1, (3,))
    assert looked.unchecked == "loss by position: not measured."


@pytest.mark.parametrize(
    ("exponents", "options"),
    [
        ({1: SOME, 2: SOME}, {}),  # one head keeps choosing
        ({1: ALL, 2: SOME, 3: SOME}, {}),  # one layer of three
        ({1: [0.8, 0.85], 2: [0.8, 0.8]}, {}),  # broad, and yet choosier at length
        ({1: ALL, 2: ALL}, {"stderr": 0.05}),  # cannot be told from 0.9
    ],
)
def test_it_is_clear_where_a_head_of_the_layers_keeps_choosing(exponents, options):
    looked = look(exponents, **options)
    assert not looked.suspicions
    assert "effective keys grow slower" in looked.clear
    assert looked.clear.endswith("loss by position: not measured.")


def test_the_initialisation_is_the_reference_where_it_was_run_at_these_contexts():
    (suspicion,) = look({1: ALL}, initial={1: [1.01, 1.02]}).suspicions
    assert suspicion.comparisons[0].against == "initialisation"
    assert suspicion.comparisons[0].expected == pytest.approx(1.02)  # of the slowest head
    assert "+1.02 at its own initialisation" in suspicion.claim


def test_what_cannot_be_judged_is_said():
    assert "--contexts 256,1024,4096" in FAILURE.look(Evidence((), weights="trained")).unchecked
    assert "two sequences" in look({1: ALL}, n=1).unchecked
    assert "not known" in look({1: ALL}, weights="unknown").unchecked
    assert look({1: ALL, 2: ALL}, floor=(0, 1)).unchecked


def test_fresh_weights_are_not_judged():
    told = diagnose(grown(METRIC, {1: ALL}, weights="fresh"), [FAILURE])
    assert told.verdicts == ()
    assert "trained weights only" in told.unchecked[0].words
