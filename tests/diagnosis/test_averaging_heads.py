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


def test_most_heads_of_several_layers_are_a_warning_at_those_layers_and_heads():
    (suspicion,) = FAILURE.look(averaging(*MOST, (4, 0))).suspicions
    assert suspicion.severity is Severity.WARN
    assert suspicion.layers == (2, 3)
    assert suspicion.heads == tuple(MOST)
    assert [(test.intervention.kind, test.intervention.layer, test.intervention.heads) for test in suspicion.tests] == [
        ("mean-head", 2, (0, 1, 3)),
        ("mean-head", 3, (0, 1, 3)),
    ]
    assert {one.against for one in suspicion.comparisons} == {"initialisation"}
    assert "6 heads" in suspicion.claim
    assert "(0.999 at initialisation)" in suspicion.claim


def test_most_heads_of_one_layer_are_a_note():
    (suspicion,) = FAILURE.look(averaging((2, 0), (2, 1), (2, 2))).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.NOTE, (2,))


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
    (suspicion,) = FAILURE.look(evidence_of(model)).suspicions
    assert suspicion.layers == (2, 3)
    assert len(suspicion.heads) == 8
    healthy = small(causal=causal)
    with torch.no_grad():
        for block in healthy.blocks:
            block.q.weight *= 6
    assert FAILURE.look(evidence_of(healthy)).clear
