"""Where attention rests, and when that is held against a model."""

import pytest
import torch
from head_rows import Told, course, evidence, floor_at, grid, head
from small_heads import evidence_of, rest_on, small

from fullrank.diagnosis import diagnose
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


def massive(ratio, rms=30.0, *, sink=True, **known):
    rows = [
        *grid({(3, 0): FIRST} if sink else {}),
        *course("rms", {1: 1.0, 2: rms}),
        *course("max_to_median", {1: 9.0, 2: ratio}),
    ]
    return evidence(rows, **known)


def largest(ratio, rms, entries=64 * 64):
    return rms * (entries / (1 + 2.2 * entries / ratio**2)) ** 0.5


def test_massive_activations_are_held_against_a_dtype_that_cannot_hold_them():
    rms = 2 * 65504 / largest(5000, 1.0)
    for known in ({"dtypes": ("float16",)}, {"dtype": "float16"}):
        _, suspicion = FAILURE.look(massive(5000.0, rms, **known)).suspicions
        assert (suspicion.severity, suspicion.layers) == (Severity.WARN, (2,))
        assert "float16" in suspicion.claim
        held = [one for one in suspicion.comparisons if one.against == "dtype"]
        assert held[0].ratio == pytest.approx(2)
    assert FAILURE.look(massive(5000.0, rms, sink=False, dtypes=("float16",))).clear  # a matter of numerics
    held = [
        massive(5000.0, rms),  # float32 can
        massive(5000.0, rms, dtypes=("bfloat16",)),
        massive(5000.0, rms / 4, dtypes=("float16",)),
        massive(50.0, 1e6, dtypes=("float16",)),  # large, not massive
    ]
    assert [len(FAILURE.look(seen).suspicions) for seen in held] == [1, 1, 1, 1]
    (both,) = [one for one in FAILURE.look(massive(5000.0, 20.0, dtypes=("float8_e4m3",))).suspicions if not one.heads]
    assert "float8_e4m3 (at most 448)" in both.claim


def test_the_largest_entry_is_estimated_to_within_a_factor_of_two(generator):
    X = torch.randn(1, 64, 64, generator=generator)
    X[0, 0, 3] = 40_000.0
    rms, ratio = float(X.square().mean().sqrt()), float(X.abs().max() / X.abs().median())
    assert largest(ratio, rms) == pytest.approx(40_000, rel=0.01)
    X[0, 0, 9] = -40_000.0
    assert largest(ratio, float(X.square().mean().sqrt())) == pytest.approx(40_000 * 2**0.5, rel=0.01)


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


def test_a_sink_whose_state_half_precision_cannot_hold_is_found_beside_it():
    model = resting(63, causal=True)  # on whichever token has a large entry in channel 63
    with torch.no_grad():
        model.positions.weight[0, 63] = 300_000.0
    seen = evidence_of(model, bos=True, dtypes=("float16",))
    sink, massive = FAILURE.look(seen).suspicions
    assert {(2, 2), (3, 2)} <= set(sink.heads)
    assert massive.severity is Severity.WARN
    assert massive.comparisons[-1].value == pytest.approx(300_000, rel=0.05)
    assert "Massive" not in str(FAILURE.look(evidence_of(model, bos=True)).suspicions)
