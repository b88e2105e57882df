"""Rank collapse in width: found where trained attention loses differences like random attention, and nowhere else."""

import math

import numpy as np
import pytest
from grown import CONTEXTS, grown

from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.over_contexts import growths
from fullrank.diagnosis.rank_collapse_width import FAILURE
from fullrank.report.verdict import Effect, Severity

METRIC = "contrast_gain"
RANDOM, CHOOSING, SLOW = [-0.5, -0.48], [-0.02, -0.5], [-0.2, -0.2]


def look(exponents, **options):
    return FAILURE.look(grown(METRIC, exponents, **options))


def test_trained_layers_that_fall_like_random_attention_are_named_and_no_others():
    looked = look({1: CHOOSING, 2: RANDOM, 3: CHOOSING, 4: RANDOM})
    (suspicion,) = looked.suspicions
    assert (suspicion.stack, suspicion.layers, suspicion.severity) == ("decoder", (2, 4), Severity.WARN)
    assert "layers 2, 4" in suspicion.claim
    assert "context^(−0.49) from 256 to 4096 tokens" in suspicion.claim
    (test,) = suspicion.tests
    assert (test.intervention.kind, test.intervention.layer, test.intervention.also) == ("mean-head", 2, (4,))
    assert test.expects == "no effect"
    for comparison in suspicion.comparisons:
        assert comparison.value == pytest.approx(-0.49, abs=0.005)
        assert (comparison.against, comparison.expected) == ("null", -0.5)


def test_it_is_a_note_until_it_was_tested_and_gone_where_the_test_refutes_it():
    class Trial:
        outcome = "loss"

        def __init__(self, change):
            self.change = change

        refused = ""

        def effect(self, intervention):
            return Effect(intervention.words, "loss", self.change, self.change - 1e-3, self.change + 1e-3, 8, 2.0)

    evidence = grown(METRIC, {1: RANDOM, 2: RANDOM})
    (noted,) = diagnose(evidence, [FAILURE]).verdicts
    assert noted.severity is Severity.NOTE
    assert noted.command == "fullrank examine planted --contexts 256,1024,4096 --verify"
    (warned,) = diagnose(evidence, [FAILURE], tester=Trial(1e-4)).verdicts
    assert warned.severity is Severity.WARN
    refuted = diagnose(evidence, [FAILURE], tester=Trial(0.5))
    assert refuted.verdicts == ()
    assert [one.name for one in refuted.clear] == ["rank-collapse-width"]


@pytest.mark.parametrize(
    ("exponents", "options"),
    [
        ({1: RANDOM, 2: CHOOSING, 3: CHOOSING}, {}),  # one layer of three
        ({1: CHOOSING, 2: CHOOSING}, {}),  # in each layer one head chooses its keys
        ({1: SLOW, 2: SLOW}, {}),  # well above random attention
        ({1: RANDOM, 2: RANDOM}, {"stderr": 0.2}),  # cannot be told from −1/4
        ({1: RANDOM, 2: RANDOM}, {"size": 1.5}),  # a third of the differences is left at the longest context
        ({1: SLOW, 2: SLOW}, {"initial": {1: RANDOM, 2: RANDOM}}),  # less than half of what it was
        ({1: RANDOM, 2: RANDOM}, {"weights": "fresh"}),  # every default initialisation
        ({1: RANDOM, 2: RANDOM}, {"weights": "unknown"}),
    ],
)
def test_it_is_clear_where_one_of_the_conditions_fails(exponents, options):
    looked = look(exponents, **options)
    assert not looked.suspicions
    assert not looked.unchecked
    assert "from 256 to 4096 tokens" in looked.clear


def test_the_initialisation_is_the_reference_where_it_was_run_at_these_contexts():
    """Beyond its width a network falls slower than the law even where it is fresh; what is trained no less."""
    (suspicion,) = look({1: SLOW}, initial={1: [-0.27, -0.27]}).suspicions
    (comparison,) = suspicion.comparisons
    assert comparison.against == "initialisation"
    assert comparison.expected == pytest.approx(-0.27)
    assert "−0.27 at its own initialisation" in suspicion.claim
    assert look({1: [-0.05, -0.05]}, initial={1: [-0.02, -0.02]}).clear  # hardly falling is no collapse


def test_a_head_counts_as_much_as_it_passes_on():
    """The exponent of a layer is the slope of the root mean square over its heads."""
    (layer,) = growths(grown(METRIC, {1: [0.0, -0.5, -0.7]}), METRIC)
    sizes = [math.sqrt(sum((c / 256) ** (2 * e) for e in (0.0, -0.5, -0.7)) / 3) for c in CONTEXTS]
    slope = np.polyfit(np.log(CONTEXTS), np.log(sizes), 1)[0]
    assert layer.together.value == pytest.approx(slope, rel=1e-9)
    assert -0.5 / 2 < layer.together.value < 0
    assert layer.together.high - layer.together.value == pytest.approx(2.36 * 0.01)  # as if all heads erred together


def test_fresh_weights_are_held_against_random_attention_alone():
    (suspicion,) = look({1: [-0.9, -1.0], 2: [-0.9, -0.9]}, weights="fresh").suspicions
    assert (suspicion.severity, suspicion.tests, suspicion.layers) == (Severity.NOTE, (), (1, 2))


def test_what_cannot_be_judged_is_said():
    assert "--contexts 256,1024,4096" in FAILURE.look(Evidence(())).unchecked
    assert "two sequences" in look({1: RANDOM}, n=1).unchecked
    assert look({}, n=1).unchecked
    other = grown("entropy", {1: RANDOM})
    assert "with its values" in FAILURE.look(other).unchecked


def test_nothing_rests_on_the_floor_or_on_rounding():
    assert look({1: RANDOM, 2: RANDOM}, floor=(0, 1)).unchecked
    (suspicion,) = look({1: RANDOM, 2: RANDOM}, floor=(1,)).suspicions
    assert suspicion.layers == (1,)  # what layer 2 reads is at the floor
    assert look({1: RANDOM, 2: RANDOM}, size=1e-6).unchecked


def test_every_stack_and_kind_of_attention_is_judged_for_itself():
    evidence = grown(METRIC, {1: RANDOM}, stack="encoder")
    cross = grown(METRIC, {1: CHOOSING}, part="cross")
    both = Evidence((*evidence.rows, *cross.rows), evidence.about, (*evidence.slopes, *cross.slopes), weights="trained")
    (suspicion,) = FAILURE.look(both).suspicions
    assert suspicion.stack == "encoder"
    (crossed,) = look({1: RANDOM}, part="cross").suspicions
    assert crossed.claim.startswith("In cross attention of decoder layer 1 ")
    assert crossed.tests[0].intervention.part == "cross"


class Nowhere:
    """A model on which nothing can be tested."""

    outcome = "loss"

    refused = ""

    def effect(self, intervention):
        return "its kernel cannot be rewritten."


@pytest.mark.parametrize(("initial", "severity"), [(None, Severity.NOTE), ({1: RANDOM, 2: RANDOM}, Severity.WARN)])
def test_where_nothing_can_be_tested_the_initialisation_decides(initial, severity):
    """The law alone, whose assumptions nobody has checked here, leaves a note."""
    evidence = grown(METRIC, {1: RANDOM, 2: RANDOM}, initial=initial)
    (verdict,) = diagnose(evidence, [FAILURE], tester=Nowhere()).verdicts
    assert verdict.severity is severity
