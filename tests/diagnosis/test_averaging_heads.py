"""Heads that only average, after training."""

import pytest
import torch
from head_rows import Told, evidence, floor_at, grid, head
from small_heads import evidence_of, small

from fullrank.diagnosis import diagnose
from fullrank.diagnosis.averaging_heads import FAILURE
from fullrank.report.verdict import Severity

UNIFORM = {"entropy": 0.998, "selectivity": 0.003}


def averaging(*places):
    return evidence(grid(dict.fromkeys(places, UNIFORM)))


MOST = [(layer, index) for layer in (2, 3) for index in (0, 1, 3)]


def test_most_heads_of_several_layers_are_one_warning_at_those_layers_and_heads():
    tester = Told(0.0)
    (verdict,) = diagnose(averaging(*MOST, (4, 0)), [FAILURE], tester=tester).verdicts
    assert verdict.severity is Severity.WARN
    assert verdict.layers == (2, 3)
    assert verdict.heads == tuple(MOST)
    assert [(one.kind, one.layer, one.heads) for one in tester.asked] == [
        ("mean-head", 2, (0, 1, 3)),
        ("mean-head", 3, (0, 1, 3)),
    ]
    assert len(verdict.effects) == 2
    assert {one.against for one in verdict.comparisons} == {"initialisation"}
    assert "6 heads" in verdict.claim
    assert "2 of 4 layers" in verdict.claim
    assert "(0.999 at initialisation)" in verdict.claim


def test_most_heads_of_one_layer_are_a_note_even_when_tested():
    (verdict,) = diagnose(averaging((2, 0), (2, 1), (2, 2)), [FAILURE], tester=Told(0.0)).verdicts
    assert (verdict.severity, verdict.layers) == (Severity.NOTE, (2,))
    assert verdict.effects


def test_a_few_averaging_heads_are_clear_and_counted():
    looked = FAILURE.look(averaging((1, 0), (2, 1), (2, 2)))
    assert not looked.suspicions
    assert "3 of 16 heads" in looked.clear


@pytest.mark.parametrize("numbers", [{"entropy": 0.95, "selectivity": 0.2}, {"entropy": 0.86, "selectivity": 0.02}])
def test_spread_rows_that_differ_and_alike_rows_that_do_not_spread_are_no_plain_averages(numbers):
    looked = FAILURE.look(evidence(grid(**numbers)))
    assert "0 of 16 heads" in looked.clear


def test_a_head_whose_selectivity_is_not_surely_low_is_not_counted():
    rows = grid(**UNIFORM | {"stderr": 0.03})
    assert not FAILURE.look(evidence(rows)).suspicions


def test_layers_that_read_a_state_at_the_float_floor_are_left_out():
    rows = [*grid(dict.fromkeys(MOST, UNIFORM)), floor_at(1), floor_at(2)]
    assert not FAILURE.look(evidence(rows)).suspicions
    only = [*head(1, 0, **UNIFORM), floor_at(0)]
    assert "float floor" in FAILURE.look(evidence(only)).unchecked


def test_without_attention_it_is_unchecked():
    assert FAILURE.look(evidence([])).unchecked


def test_means_that_change_nothing_confirm_it_and_means_that_do_refute_it():
    found = diagnose(averaging(*MOST), [FAILURE], tester=Told(0.002)).verdicts
    assert [verdict.severity for verdict in found] == [Severity.WARN]
    refuted = diagnose(averaging(*MOST), [FAILURE], tester=Told(0.2))
    assert not refuted.verdicts
    assert "refuted" in refuted.clear[0].words
    assert diagnose(averaging(*MOST), [FAILURE]).verdicts[0].severity is Severity.NOTE


class OneMatters(Told):
    """The means of one layer change the loss by `change`, those of others do not."""

    layer = 3

    refused = ""

    def effect(self, intervention):
        mine = Told(self.change if intervention.layer == self.layer else 0.0)
        return mine.effect(intervention)


def test_a_layer_whose_means_change_the_loss_is_left_out_and_said_and_the_others_stay():
    three = [*MOST, (4, 0), (4, 1), (4, 2)]
    (verdict,) = diagnose(averaging(*three), [FAILURE], tester=OneMatters(0.2)).verdicts
    assert (verdict.severity, verdict.layers) == (Severity.WARN, (2, 4))
    assert {layer for layer, _ in verdict.heads} == {2, 4}
    assert "Not so those of layer 3" in verdict.claim
    (verdict,) = diagnose(averaging(*MOST), [FAILURE], tester=OneMatters(0.2)).verdicts
    assert (verdict.severity, verdict.layers) == (Severity.NOTE, (2,))  # one layer that pools is a design


def test_a_layer_of_which_nothing_could_be_told_is_a_note():
    three = [*MOST, (4, 0), (4, 1), (4, 2)]
    found = diagnose(averaging(*three), [FAILURE], tester=OneMatters(0.01)).verdicts
    assert [(one.severity, one.layers) for one in found] == [(Severity.WARN, (2, 4)), (Severity.NOTE, (3,))]


@pytest.mark.parametrize(
    ("selectivity", "kept", "severity"),
    [(0.001, True, Severity.WARN), (0.02, True, Severity.NOTE), (0.001, False, Severity.NOTE)],
)
def test_where_no_mean_can_be_taken_heads_must_be_no_more_selective_than_at_initialisation(selectivity, kept, severity):
    given = grid(dict.fromkeys(MOST, UNIFORM | {"selectivity": selectivity}))
    rows = [row for row in given if kept or row.source == "measured"]
    (verdict,) = diagnose(evidence(rows), [FAILURE], tester=Told("the heads cannot be told apart.")).verdicts
    assert (verdict.severity, verdict.layers) == (severity, (2, 3))


def test_fresh_weights_are_not_asked():
    rows = grid(**UNIFORM)
    found = diagnose(evidence(rows, weights="fresh"), [FAILURE])
    assert not found.verdicts
    assert found.unchecked[0].name == FAILURE.name
    unknown = diagnose(evidence(rows, weights="unknown"), [FAILURE])
    assert not unknown.verdicts
    assert "not known" in unknown.unchecked[0].words


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_whose_queries_vanished_is_found_at_those_layers(causal):
    model = small(causal=causal)
    with torch.no_grad():
        for block in model.blocks:  # selective heads
            block.q.weight *= 6
        for block in model.blocks[1:]:
            block.q.weight.zero_()
            block.q.bias.zero_()
    (verdict,) = diagnose(evidence_of(model), [FAILURE]).verdicts
    assert verdict.layers == (2, 3)
    assert len(verdict.heads) == 8
    healthy = small(causal=causal)
    with torch.no_grad():
        for block in healthy.blocks:
            block.q.weight *= 6
    assert FAILURE.look(evidence_of(healthy)).clear
