"""Where attention rests, and when that is held against a model."""

import dataclasses

import pytest
import torch
from head_rows import Told, course, evidence, floor_at, grid, head
from small_heads import evidence_of, rest_on, small

from fullrank.diagnosis import diagnose, numerics
from fullrank.diagnosis.sinks import FAILURE
from fullrank.report.verdict import Severity

FIRST = {"entropy": 0.3, "selectivity": 0.3, "sink_mass": 0.8, "sink_position": 0.0}
LATER = FIRST | {"sink_position": 11.0}


def with_sinks(numbers=FIRST, places=((2, 1), (3, 0), (3, 2)), **known):
    return evidence(grid(dict.fromkeys(places, numbers)), **known)


def test_sinks_are_a_note_that_says_where_and_what_hiding_them_costs():
    seen = with_sinks(causal=True, bos=True)
    (suspicion,) = FAILURE.look(seen).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.NOTE, (2, 3))
    assert suspicion.heads == ((2, 1), (3, 0), (3, 2))
    assert "3 of 16 heads" in suspicion.claim
    assert "the token for the beginning" in suspicion.claim
    assert {one.against for one in suspicion.comparisons} == {"initialisation"}
    tester = Told(0.7)
    (verdict,) = diagnose(seen, [FAILURE], tester=tester).verdicts
    assert (verdict.severity, verdict.effects[0].change) == (Severity.NOTE, 0.7)
    (asked,) = tester.asked
    assert (asked.kind, asked.layer, asked.also, asked.position) == ("mask-sink", 2, (3,), 0)


def test_a_sink_that_costs_nothing_to_hide_is_told_as_well():
    (verdict,) = diagnose(with_sinks(causal=True, bos=True), [FAILURE], tester=Told(0.0)).verdicts
    assert verdict.effects[0].change == 0.0


@pytest.mark.parametrize(
    ("known", "severity"),
    [
        ({"causal": True, "bos": False}, Severity.WARN),
        ({"causal": True, "bos": True}, Severity.NOTE),
        ({"causal": True, "bos": None}, Severity.NOTE),
        ({"causal": False, "bos": False}, Severity.NOTE),
    ],
)
def test_only_a_missing_token_for_the_beginning_makes_the_first_tokens_sink_a_warning(known, severity):
    (suspicion,) = FAILURE.look(with_sinks(**known)).suspicions
    assert suspicion.severity is severity
    assert ("which is content" in suspicion.claim) == (severity is Severity.WARN)


def test_the_warning_is_of_the_heads_that_rest_on_the_first_token():
    rows = grid({(1, 0): FIRST, (1, 1): FIRST, (4, 3): LATER})
    (suspicion,) = FAILURE.look(evidence(rows, causal=True, bos=False)).suspicions
    assert suspicion.severity is Severity.WARN
    assert suspicion.heads == ((1, 0), (1, 1))


def test_later_keys_are_a_note_and_are_not_hidden_since_sequences_differ():
    (suspicion,) = FAILURE.look(with_sinks(LATER, causal=True, bos=False)).suspicions
    assert (suspicion.severity, suspicion.tests) == (Severity.NOTE, ())
    assert "position 11" in suspicion.claim


def test_a_mass_that_is_small_or_unsure_or_usual_for_so_few_keys_is_no_sink():
    assert "no key holds more than 0.1" in FAILURE.look(evidence(grid())).clear
    assert FAILURE.look(with_sinks(FIRST | {"sink_mass": 0.35, "stderr": 0.05})).clear
    assert FAILURE.look(evidence(head(1, 0, keys=5, sink_mass=0.5))).clear


def test_layers_that_read_a_state_at_the_float_floor_are_left_out():
    rows = [*grid({(2, 1): FIRST}), floor_at(1)]
    assert FAILURE.look(evidence(rows)).clear


def test_without_attention_it_is_unchecked():
    assert "not seen" in FAILURE.look(evidence([])).unchecked


def massive(size=2e5, *, ratio=5000.0, at=0, **known):
    rows = [
        *grid({(3, 0): FIRST}),
        *course("max_abs", {1: 3.0, 2: size, 3: size / 2}),
        *course("max_to_median", {1: 9.0, 2: ratio, 3: ratio}),
        *course("max_abs_position", {1: 5.0, 2: at, 3: at}),
    ]
    return evidence(rows, **known)


def test_massive_activations_of_a_sink_are_a_fact_of_its_note():
    (note,) = FAILURE.look(massive(2e4, dtypes=("float16",))).suspicions  # it can hold them
    assert note.severity is Severity.NOTE
    assert "holds the stream's largest entry in layers 2–3, 20000 after layer 2, 5000 times the median" in note.claim
    assert ("max_abs", 2e4) in [(one.metric, one.value) for one in note.comparisons]


@pytest.mark.parametrize("other", [{"at": 7}, {"ratio": 900.0}])
def test_large_entries_of_other_tokens_and_those_that_are_not_massive_are_not_told_here(other):
    (note,) = FAILURE.look(massive(dtypes=("float16",), **other)).suspicions
    assert "largest entry" not in note.claim
    assert {one.metric for one in note.comparisons} == {"sink_mass"}


@pytest.mark.parametrize("known", [{"dtypes": ("float16",)}, {"dtype": "float16"}, {"dtypes": ("float16", "bfloat16")}])
def test_massive_activations_of_a_sink_are_held_against_a_dtype_that_cannot_hold_them(known):
    _, beyond = FAILURE.look(massive(**known)).suspicions
    assert (beyond.severity, beyond.layers, beyond.exceeded) == (Severity.WARN, (2, 3), True)
    assert "2.0e5 after layer 2, is more than float16 (at most 65504) can hold" in beyond.claim
    assert {one.against for one in beyond.comparisons} == {"dtype"}
    assert max(one.ratio for one in beyond.comparisons) == pytest.approx(2e5 / 65504)


def test_every_dtype_that_is_too_narrow_is_named_and_those_that_are_not_say_nothing():
    assert len(FAILURE.look(massive()).suspicions) == 1
    assert len(FAILURE.look(massive(dtypes=("bfloat16",))).suspicions) == 1
    _, both = FAILURE.look(massive(dtypes=("float16", "float8_e4m3"))).suspicions
    assert "float16 (at most 65504) and float8_e4m3 (at most 448)" in both.claim


# ---------------------------------------------------------------- without a test that could decide


def severity(seen):
    (verdict,) = diagnose(seen, [FAILURE], tester=Told(0.5)).verdicts
    return verdict.severity


@pytest.mark.parametrize(
    ("initial_mass", "expected"), [(0.03, Severity.WARN), (0.39, Severity.WARN), (0.41, Severity.NOTE)]
)
def test_a_sink_on_content_is_a_warning_only_where_it_is_more_than_at_initialisation(initial_mass, expected):
    rows = [
        row
        if (row.source, row.metric) != ("initialisation", "sink_mass")
        else dataclasses.replace(row, value=initial_mass)
        for row in grid({(2, 1): FIRST, (3, 0): FIRST})
    ]
    assert severity(evidence(rows, causal=True, bos=False)) is expected


def test_without_a_reference_a_sink_on_content_is_a_note():
    rows = [row for row in grid({(2, 1): FIRST}) if row.source == "measured"]
    assert severity(evidence(rows, causal=True, bos=False)) is Severity.NOTE
    assert severity(evidence(grid({(2, 1): FIRST}), causal=True, bos=False)) is Severity.WARN
    assert severity(evidence(grid({(2, 1): FIRST}), causal=True, bos=True)) is Severity.NOTE


# ---------------------------------------------------------------- in a model


def resting(position, *, causal):
    model = small(causal=causal)
    for block in model.blocks[1:]:
        rest_on(block, 2, position)
    return model


def test_a_model_without_its_beginning_whose_heads_rest_on_content_is_found_at_those_heads():
    seen = evidence_of(resting(0, causal=True), bos=False)
    (suspicion,) = FAILURE.look(seen).suspicions
    assert (suspicion.severity, suspicion.heads) == (Severity.WARN, ((2, 2), (3, 2)))
    with_bos = evidence_of(resting(0, causal=True), bos=True)
    assert FAILURE.look(with_bos).suspicions[0].severity is Severity.NOTE


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_with_plain_attention_has_no_sink(causal):
    assert FAILURE.look(evidence_of(small(causal=causal), bos=False)).clear


def test_a_sink_whose_state_half_precision_cannot_hold_is_found_at_it_and_told_once():
    model = resting(63, causal=True)  # on whichever token has a large entry in channel 63
    with torch.no_grad():
        model.positions.weight[0, 63] = 300_000.0
    seen = evidence_of(model, bos=True, dtypes=("float16",))
    sink, beyond = FAILURE.look(seen).suspicions
    assert {(2, 2), (3, 2)} <= set(sink.heads)
    assert beyond.severity is Severity.WARN
    assert beyond.comparisons[-1].value == pytest.approx(300_000, rel=0.001)
    said = numerics.FAILURE.look(seen).suspicions
    assert not {layer for one in said if "entry" in one.claim for layer in one.layers} & set(beyond.layers)
    assert len(FAILURE.look(evidence_of(model, bos=True)).suspicions) == 1
