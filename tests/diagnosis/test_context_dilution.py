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
    assert looked.unchecked.startswith("the loss by position is not known: this attention")


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
    assert "loss by position" in looked.clear


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


def test_dilution_that_still_lowers_the_loss_is_no_fault():
    exponents = {1: ALL, 2: SOME, 3: ALL}
    looked = look(exponents, loss=(-0.12, -0.14, -0.1))
    assert not looked.suspicions
    assert looked.clear == (
        "from 256 to 4096 tokens attention of decoder layers 1, 3 reads all the keys that are added, and they are of "
        "use: the loss by position changes by −0.12 nats per doubling of the context (95 %: −0.14 to −0.1)."
    )


@pytest.mark.parametrize(
    "loss",
    [(0.02, 0.0, 0.04), (-0.004, -0.006, -0.002), (-0.12, -0.3, 0.06)],  # rising, falling by nothing, not known to fall
)
def test_a_loss_that_is_not_known_to_fall_keeps_the_suspicion_and_is_told(loss):
    looked = look({1: ALL, 2: ALL}, loss=loss)
    (suspicion,) = looked.suspicions
    assert "and the loss by position changes by " in suspicion.claim
    assert not looked.unchecked


def test_a_loss_that_was_not_seen_is_said_with_its_reason():
    looked = look({1: ALL, 2: ALL}, loss="the model returns no logits of every token")
    (suspicion,) = looked.suspicions
    assert "loss" not in suspicion.claim
    assert looked.unchecked == "loss by position: not known, the model returns no logits of every token."


class Nowhere:
    """A model on which nothing can be tested."""

    outcome = "loss"

    refused = ""

    def effect(self, intervention):
        return "its kernel cannot be rewritten."


@pytest.mark.parametrize(
    ("initial", "severity"),
    [
        (None, Severity.NOTE),  # no reference at these contexts
        ({1: [1.2, 1.2], 2: [1.2, 1.2]}, Severity.NOTE),  # one that is not reached
        ({1: [1.0, 1.0], 2: [1.0, 1.0]}, Severity.WARN),
    ],
)
def test_where_nothing_can_be_tested_the_initialisation_decides(initial, severity):
    (verdict,) = diagnose(
        grown(METRIC, {1: ALL, 2: ALL}, size=100.0, initial=initial), [FAILURE], tester=Nowhere()
    ).verdicts
    assert verdict.severity is severity
