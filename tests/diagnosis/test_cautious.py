"""Where a verdict must say less: one document, a small loss, noise for an input, a chain of heads."""

import math

import pytest
import torch
from depth_rows import Told, evidence, over_depth
from head_rows import Told as HeadsTold
from head_rows import evidence as evidence_of_heads
from head_rows import grid
from test_redundant_heads import nearest

from fullrank.diagnosis import Intervention, Test, diagnose
from fullrank.diagnosis.averaging_heads import FAILURE as AVERAGING
from fullrank.diagnosis.dead_depth import FAILURE as DEAD
from fullrank.diagnosis.redundant_heads import FAILURE as REDUNDANT
from fullrank.diagnosis.thresholds import effect_limits
from fullrank.report.verdict import Effect, Severity

SKIP = Intervention("skip-block", "encoder", 2)
DEAD_ROWS = [
    *over_depth("update_share", (0.5, 0.01, 0.02, 0.6), start=1),
    *over_depth("update_share", (0.5, 0.2, 0.2, 0.6), start=1, source="initialisation"),
]


class Refusing(Told):
    """A tester that can test nothing on its batch."""

    refused = "one document: at least two are needed to say how sure an effect is."

    def effect(self, intervention):
        return self.refused


def test_what_a_batch_cannot_test_stays_a_note_although_the_initialisation_was_exceeded():
    (verdict,) = diagnose(evidence(DEAD_ROWS), [DEAD], tester=Refusing()).verdicts
    assert (verdict.severity, verdict.effects) == (Severity.NOTE, ())
    assert verdict.command.endswith("--verify")  # as if nothing had been asked for
    found = diagnose(evidence(DEAD_ROWS), [DEAD], tester=Refusing())
    assert found.outcome == ""
    assert [one.words for one in found.unchecked] == [f"nothing could be tested: {Refusing.refused}"]


def test_what_this_model_cannot_be_tested_for_rests_on_the_initialisation_and_claims_nothing_of_blocks_together():
    (verdict,) = diagnose(evidence(DEAD_ROWS), [DEAD], tester=Told(otherwise="cannot be skipped.")).verdicts
    assert verdict.severity is Severity.WARN
    assert "each of them" in verdict.claim
    assert "together" not in verdict.claim


@pytest.mark.parametrize(
    ("baseline", "change", "confirmed"),
    [
        (3.0, 0.005, True),  # a cross-entropy, and half of a hundredth of a nat
        (3.0, 0.02, False),
        (0.05, 0.008, False),  # a mean squared error that rises by a sixth
        (0.05, 0.0005, True),
        (0.05, -0.008, False),
        (0.0005, 0.0001, None),  # fitted to the last digit
    ],
)
def test_an_effect_on_a_small_loss_is_a_share_of_it(baseline, change, confirmed):
    effect = Effect(SKIP.words, "loss", change, change - 2e-4, change + 2e-4, 8, baseline)
    assert Test(SKIP, "no effect", effect_limits()).confirms(effect) is confirmed


def test_heads_that_average_noise_are_a_note_that_no_intervention_confirms():
    rows = grid(entropy=0.998, selectivity=0.003)
    seen, noise = evidence_of_heads(rows), evidence_of_heads(rows)
    noise.about["input"]["kind"] = "random tokens"
    tester, asked = HeadsTold(0.0), HeadsTold(0.0)
    (warned,) = diagnose(seen, [AVERAGING], tester=tester).verdicts
    assert warned.severity is Severity.WARN
    (noted,) = diagnose(noise, [AVERAGING], tester=asked).verdicts
    assert noted.severity is Severity.NOTE
    assert "On random tokens there is nothing to look for" in noted.claim
    assert asked.asked == []


def test_a_chain_of_heads_loses_what_its_angles_add_up_to():
    chain = {(1, 0): (1, 0.985), (1, 1): (2, 0.985), (1, 2): (1, 0.985)}
    (suspicion,) = REDUNDANT.look(evidence_of_heads(nearest(chain))).suspicions
    lost = 100 * math.sin(2 * math.acos(0.985))
    assert f"at most {lost:.1f} % of what was dropped" in suspicion.claim
    worst = torch.tensor([math.cos(2 * math.acos(0.985)), math.sin(2 * math.acos(0.985))])
    assert float(worst[1]) * 100 == pytest.approx(lost)  # the third head, at two such angles from the first
