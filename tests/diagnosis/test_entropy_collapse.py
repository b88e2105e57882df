"""Attention frozen on a few keys, told apart from pointers and sinks."""

import pytest
import torch
from head_rows import Told, evidence, floor_at, grid, head, of_head
from small_heads import evidence_of, point_to_the_previous, rest_on, small

from fullrank.diagnosis import diagnose
from fullrank.diagnosis.entropy_collapse import FAILURE
from fullrank.report.verdict import Severity

ON_CONTENT = {"entropy": 0.005, "selectivity": 0.01, "sink_mass": 0.98, "sink_position": 9.0, "logit_std": 120.0}
SCATTERED = {"entropy": 0.01, "selectivity": 2.8, "sink_mass": 0.2, "sink_position": 9.0, "logit_std": 120.0}
POINTER = {"entropy": 0.001, "selectivity": 4.1, "sink_mass": 0.02, "logit_std": 60.0}
WHOLE_LAYER = [(3, index) for index in range(4)]


def with_heads(numbers, *places, **known):
    return evidence(grid(dict.fromkeys(places, numbers)), **known)


def gradients(queries, initial=0.2, *, layers=4, heads=4):
    """Gradients of every head's queries and values; those of `queries` are what it says."""
    places = [(layer, index) for layer in range(1, layers + 1) for index in range(heads)]
    rows = []
    for source, special in (("measured", queries), ("initialisation", {})):
        q = {place: special.get(place, initial) for place in places}
        rows += of_head("gradient_rms", q, site="gradient", part="self.q", source=source)
        rows += of_head("gradient_rms", dict.fromkeys(places, 1.0), site="gradient", part="self.v", source=source)
    return rows


def test_heads_frozen_on_one_key_are_a_failure_of_their_layer_with_both_references():
    (suspicion,) = FAILURE.look(with_heads(ON_CONTENT, *WHOLE_LAYER)).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.FAIL, (3,))
    assert suspicion.heads == tuple(WHOLE_LAYER)
    (test,) = suspicion.tests
    assert (test.intervention.kind, test.intervention.heads, test.expects) == ("mean-head", (0, 1, 2, 3), "told")
    assert {one.metric for one in suspicion.comparisons} == {"normalized_entropy", "selectivity", "logit_std"}
    assert all(one.against == "initialisation" for one in suspicion.comparisons)
    assert "(0.2 at initialisation)" in suspicion.claim


def test_one_frozen_head_is_a_warning_and_each_layer_has_its_own_verdict():
    found = FAILURE.look(with_heads(ON_CONTENT, (1, 2), (4, 0))).suspicions
    assert [(one.severity, one.layers, one.heads) for one in found] == [
        (Severity.WARN, (1,), ((1, 2),)),
        (Severity.WARN, (4,), ((4, 0),)),
    ]


def test_heads_frozen_on_various_keys_are_told_and_no_effect_decides():
    seen = with_heads(SCATTERED, *WHOLE_LAYER)
    for change in (0.0, 0.5, -0.5):
        (verdict,) = diagnose(seen, [FAILURE], tester=Told(change)).verdicts
        assert (verdict.severity, verdict.layers, verdict.effects[0].change) == (Severity.WARN, (3,), change)


def test_that_alike_rows_are_their_own_mean_confirms_nothing_and_the_initialisation_decides():
    seen = with_heads(ON_CONTENT, *WHOLE_LAYER)
    alone = evidence([row for row in seen.rows if row.source == "measured"])
    for tester in (Told(0.0), Told(0.3), Told("a kernel that cannot be rewritten.")):
        assert diagnose(seen, [FAILURE], tester=tester).worst is Severity.FAIL
        assert diagnose(alone, [FAILURE], tester=tester).worst is Severity.NOTE  # no initialisation
    assert diagnose(seen, [FAILURE]).worst is Severity.NOTE


@pytest.mark.parametrize(
    ("weights", "ratio", "worst"),
    [
        ("trained", 1e-7, Severity.WARN),  # a hundred thousandth of .2 and less
        ("fresh", 1e-8, Severity.WARN),  # rounding of float32 beside the gradient of values
        ("fresh", 3e-7, Severity.NOTE),  # below the usual, and not yet rounding
        ("trained", 1e-3, None),
        ("fresh", 1e-3, None),
    ],
)
def test_a_gradient_counts_against_the_initialisation_or_of_fresh_weights_against_the_dtype(weights, ratio, worst):
    rows = grid({(2, 1): ON_CONTENT | {"logit_std": 8.0}}) + gradients({(2, 1): ratio})
    assert diagnose(evidence(rows, weights=weights), [FAILURE], tester=Told(0.0)).worst is worst
    measured = [row for row in rows if row.source == "measured"]
    alone = diagnose(evidence(measured, weights=weights), [FAILURE], tester=Told(0.0)).worst
    assert alone is (Severity.NOTE if worst is not None and weights == "trained" else worst)


def test_a_head_without_entropy_that_points_each_query_to_its_own_key_is_healthy():
    looked = FAILURE.look(with_heads(POINTER, *WHOLE_LAYER))
    assert "4 of 16 heads have almost no entropy: 4 point" in looked.clear


def test_a_head_that_rests_on_the_first_token_is_a_sink_and_no_collapse():
    resting = ON_CONTENT | {"sink_position": 0.0, "logit_std": 60.0}
    assert FAILURE.look(with_heads(resting, *WHOLE_LAYER)).clear


def on_a_delimiter(*others, logit_std=60.0, keys=9.0):
    """A head that is sharp on position 9, and others of moderate logits that rest on `keys`."""
    sharp = {(3, 1): ON_CONTENT | {"logit_std": logit_std}}
    resting = {"entropy": 0.3, "selectivity": 0.1, "sink_mass": 0.7, "sink_position": keys, "logit_std": 5.0}
    return evidence(grid(sharp | dict.fromkeys(others, resting)))


def test_a_head_that_rests_where_others_do_that_are_not_frozen_is_a_sink_and_no_collapse():
    looked = FAILURE.look(on_a_delimiter((1, 0), (2, 3)))
    assert "rest on a sink" in looked.clear
    for seen in (
        on_a_delimiter((1, 0)),  # one may be there by chance
        on_a_delimiter((1, 0), (2, 3), keys=12.0),  # elsewhere
        on_a_delimiter((1, 0), (2, 3), logit_std=120.0),  # whatever it rests on
        with_heads(ON_CONTENT | {"logit_std": 60.0}, (1, 0), (2, 3), (3, 1)),  # frozen ones do not vouch
    ):
        assert (3, 1) in [place for one in FAILURE.look(seen).suspicions for place in one.heads]


def test_logits_that_no_training_takes_back_are_a_warning_whatever_the_heads_point_to():
    (suspicion,) = FAILURE.look(with_heads(POINTER | {"logit_std": 400.0}, *WHOLE_LAYER)).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.WARN, (3,))


def test_a_head_that_rests_on_a_delimiter_with_moderate_logits_is_no_collapse():
    assert FAILURE.look(with_heads(ON_CONTENT | {"logit_std": 6.0}, *WHOLE_LAYER)).clear


def test_large_logits_with_entropy_left_and_logits_as_large_from_the_start_are_no_collapse():
    assert FAILURE.look(with_heads(SCATTERED | {"entropy": 0.2}, *WHOLE_LAYER)).clear
    rows = [row for row in grid(dict.fromkeys(WHOLE_LAYER, SCATTERED)) if row.source == "measured"]
    rows += [row for place in WHOLE_LAYER for row in head(*place, **SCATTERED, source="initialisation")]
    assert FAILURE.look(evidence(rows)).clear
    assert FAILURE.look(evidence(rows, weights="fresh")).suspicions  # there the initialisation is itself frozen


def test_a_vanished_query_gradient_counts_where_the_logits_do_not():
    rows = grid({(2, 1): ON_CONTENT | {"logit_std": 8.0}})
    (suspicion,) = FAILURE.look(evidence(rows + gradients({(2, 1): 1e-7}))).suspicions
    assert suspicion.heads == ((2, 1),)
    (gradient,) = [one for one in suspicion.comparisons if one.metric == "gradient_rms"]
    assert (gradient.value, gradient.expected) == (1e-7, 0.2)
    assert "queries whose gradient" in suspicion.claim
    assert FAILURE.look(evidence(rows + gradients({(2, 1): 1e-3}))).clear


def test_an_entropy_that_is_not_surely_low_is_not_enough():
    assert FAILURE.look(with_heads(ON_CONTENT | {"stderr": 0.1}, *WHOLE_LAYER)).clear


def test_a_layer_that_reads_rounding_errors_is_left_out():
    rows = [*grid(dict.fromkeys(WHOLE_LAYER, ON_CONTENT)), floor_at(2)]
    assert FAILURE.look(evidence(rows)).clear


def test_what_cannot_be_told_is_unchecked():
    assert FAILURE.look(evidence([])).unchecked
    blind = [row for row in grid({(2, 1): ON_CONTENT}) if row.metric not in ("logit_std", "log_context_gauge")]
    assert "--gradients" in FAILURE.look(evidence(blind)).unchecked


# ---------------------------------------------------------------- in a model


def scaled(model, layer, factor):
    with torch.no_grad():
        model.blocks[layer - 1].q.weight *= factor
        model.blocks[layer - 1].q.bias *= factor
    return model


@pytest.mark.parametrize("causal", [False, True])
def test_logits_scaled_until_the_softmax_freezes_are_found_at_their_layer(causal):
    seen = evidence_of(scaled(small(causal=causal), 2, 500))
    (suspicion,) = FAILURE.look(seen).suspicions
    assert suspicion.layers == (2,)
    assert len(suspicion.heads) >= 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_pointer_and_a_sink_made_by_hand_are_clear(causal):
    model = small(causal=causal)
    point_to_the_previous(model.blocks[0], 1)
    rest_on(model.blocks[1], 2, 0)
    rest_on(model.blocks[2], 3, 5, strength=5)
    looked = FAILURE.look(evidence_of(model))
    assert "heads have almost no entropy" in looked.clear


def test_a_pointer_with_large_logits_is_clear_where_all_keys_are_seen():
    model = small()
    point_to_the_previous(model.blocks[0], 1, strength=15.0)
    seen = evidence_of(model)
    assert max(row.value for row in seen.heads("logit_std", "encoder").values()) > 40
    assert FAILURE.look(seen).clear
    point_to_the_previous(model.blocks[0], 1, strength=40.0)
    assert FAILURE.look(evidence_of(model)).suspicions[0].heads == ((1, 1),)


def test_frozen_queries_are_found_by_their_gradients_alone():
    seen = evidence_of(scaled(small(), 2, 300_000), gradients=True)
    blind = [row for row in seen.rows if row.metric not in ("logit_std", "max_logit")]
    found = FAILURE.look(type(seen)(tuple(blind), seen.about, weights="trained")).suspicions
    assert [one.layers for one in found] == [(2,)]
    assert all(one.metric != "logit_std" for one in found[0].comparisons)
