"""Heads of a layer that write the same."""

import dataclasses

import pytest
import torch
from head_rows import Told, evidence, floor_at, of_head
from small_heads import copy_head, evidence_of, small

from fullrank.diagnosis import diagnose
from fullrank.diagnosis.redundant_heads import FAILURE
from fullrank.report.verdict import Severity


def nearest(pairs, *, usual=0.1, initial=0.05, stderr=0.001, layers=3, heads=4):
    """Rows of a stack; `pairs` says of a head which one is nearest, and how near."""
    places = [(layer, index) for layer in range(1, layers + 1) for index in range(heads)]
    values = {place: pairs.get(place, (0, usual))[1] for place in places}
    which = {place: float(pairs.get(place, ((place[1] + 1) % heads, 0))[0]) for place in places}
    rows = of_head("nearest_head_similarity", values, stderr=stderr) + of_head("nearest_head", which)
    return rows + of_head("nearest_head_similarity", dict.fromkeys(places, initial), source="initialisation")


PAIR = {(2, 1): (3, 0.999), (2, 3): (1, 0.999)}


def test_two_heads_that_write_alike_are_a_warning_of_both_with_the_initialisation_beside_it():
    (suspicion,) = FAILURE.look(evidence(nearest(PAIR))).suspicions
    assert (suspicion.severity, suspicion.layers, suspicion.heads) == (Severity.WARN, (2,), ((2, 1), (2, 3)))
    assert [(one.value, one.expected) for one in suspicion.comparisons] == [(0.999, 0.05), (0.999, 0.05)]
    assert "heads 1 and 3 write the same" in suspicion.claim
    assert "at most 4.47 % of what was dropped" in suspicion.claim
    merged, silenced = suspicion.tests
    assert (merged.intervention.kind, merged.intervention.groups, merged.expects) == (
        "merge-heads",
        ((1, 3),),
        "no effect",
    )
    assert (silenced.intervention.kind, silenced.intervention.heads, silenced.expects) == ("zero-head", (3,), "told")
    assert suspicion.exceeded


def test_heads_that_are_nearest_to_each_other_in_a_chain_are_one_group_and_all_but_one_are_spare():
    chain = {(1, 0): (2, 0.99), (1, 2): (0, 0.99), (1, 3): (2, 0.985)}
    (suspicion,) = FAILURE.look(evidence(nearest(chain))).suspicions
    assert suspicion.heads == ((1, 0), (1, 2), (1, 3))
    assert [test.intervention.heads for test in suspicion.tests] == [(), (2, 3)]
    assert suspicion.tests[0].intervention.groups == ((0, 2, 3),)


def test_two_pairs_of_one_layer_are_two_groups_of_one_verdict():
    pairs = {(1, 0): (3, 0.99), (1, 3): (0, 0.99), (1, 1): (2, 0.99), (1, 2): (1, 0.99)}
    (suspicion,) = FAILURE.look(evidence(nearest(pairs))).suspicions
    assert "heads 0 and 3 and heads 1 and 2" in suspicion.claim
    assert suspicion.tests[0].intervention.groups == ((0, 3), (1, 2))
    assert suspicion.tests[1].intervention.heads == (3, 2)


@dataclasses.dataclass
class Merged(Told):
    """Merging changes the loss by `change`, silencing by `silenced`; either may be a reason."""

    silenced: float | str = 0.4

    refused = ""

    def effect(self, intervention):
        return (
            super().effect(intervention)
            if intervention.kind == "merge-heads"
            else Told(self.silenced).effect(intervention)
        )


def test_that_merging_changes_nothing_decides_and_silencing_is_told():
    seen = evidence(nearest(PAIR))
    for silenced in (0.0, 0.4):
        (verdict,) = diagnose(seen, [FAILURE], tester=Merged(0.0, silenced=silenced)).verdicts
        assert (verdict.severity, [one.change for one in verdict.effects]) == (Severity.WARN, [0.0, silenced])
        refuted = diagnose(seen, [FAILURE], tester=Merged(0.3, silenced=silenced))
        assert (refuted.worst, len(refuted.clear)) == (None, 1)
    assert diagnose(seen, [FAILURE], tester=Merged(0.0095)).worst is Severity.NOTE  # ± .001: neither
    assert diagnose(seen, [FAILURE]).worst is Severity.NOTE


@pytest.mark.parametrize(
    ("weights", "referenced", "worst"),
    [
        ("trained", True, Severity.WARN),
        ("trained", False, Severity.NOTE),  # nothing to hold the cosine against
        ("fresh", True, Severity.NOTE),  # itself
    ],
)
def test_where_heads_cannot_be_merged_the_initialisation_decides(weights, referenced, worst):
    rows = [row for row in nearest(PAIR) if referenced or row.source == "measured"]
    seen = evidence(rows, weights=weights)
    for silenced in (0.4, "a kernel that cannot be rewritten."):
        found = diagnose(seen, [FAILURE], tester=Merged("W_O is not known.", silenced=silenced))
        assert found.worst is worst
        assert "layer 2 head 3 dropped and head 1 scaled instead: W_O is not known." in found.unchecked[0].words
    assert diagnose(seen, [FAILURE], tester=Merged(0.0)).worst is Severity.WARN


@pytest.mark.parametrize("known", [{"usual": 0.9}, {"usual": 0.985, "stderr": 0.005}, {"usual": 0.99, "initial": 0.95}])
def test_heads_that_are_not_surely_alike_or_were_so_from_the_start_are_clear(known):
    looked = FAILURE.look(evidence(nearest({}, **known)))
    assert "write more alike" in looked.clear


def test_layers_that_read_rounding_errors_are_left_out_and_said():
    looked = FAILURE.look(evidence([*nearest(PAIR), floor_at(1)]))
    assert "(2) left out" in looked.clear
    floors = [floor_at(layer) for layer in range(3)]
    assert "float floor" in FAILURE.look(evidence([*nearest(PAIR), *floors])).unchecked


def test_without_what_heads_write_it_is_unchecked():
    assert "--weights" in FAILURE.look(evidence([])).unchecked


@pytest.mark.parametrize("causal", [False, True])
def test_a_head_copied_over_another_is_found_in_its_layer(causal):
    model = small(causal=causal)
    copy_head(model.blocks[1], 0, 2)
    with torch.no_grad():
        model.blocks[1].o.weight[:, :16] *= 3  # up to size
    seen = evidence_of(model, of_weights=True)
    (suspicion,) = FAILURE.look(seen).suspicions
    assert suspicion.heads == ((2, 0), (2, 2))
    healthy = evidence_of(small(causal=causal), of_weights=True)
    assert FAILURE.look(healthy).clear
