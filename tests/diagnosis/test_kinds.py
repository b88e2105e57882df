"""What a head is called, from three numbers of its rows."""

import dataclasses
import math

import pytest
import torch
from head_rows import KEYS, evidence, floor_at, grid, head
from small_heads import evidence_of, point_to_the_previous, rest_on, small

from fullrank.diagnosis.kinds import heads_of, in_words, kinds
from fullrank.diagnosis.sure import above, at_least, at_most, below, margin
from fullrank.table import Row


def one(**numbers):
    return kinds(evidence(head(1, 0, **numbers)))


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("pointer", {"entropy": 0.003, "selectivity": 4.0}),
        ("pointer", {"entropy": 0.25, "selectivity": 2.0}),
        ("mixer", {"entropy": 0.6, "selectivity": 1.2}),
        ("mixer", {"entropy": 0.94, "selectivity": 0.2}),
        ("average", {"entropy": 0.999, "selectivity": 0.002}),
        ("average", {"entropy": 0.86, "selectivity": 0.11}),  # the same weighted average for every query
        ("sink", {"entropy": 0.15, "selectivity": 0.19, "sink_mass": 0.73}),
        ("sink", {"entropy": 0.15, "selectivity": 0.2, "sink_mass": 0.4}),  # two delimiters
        ("sink", {"entropy": 0.5, "selectivity": 1.0, "sink_mass": 0.6}),
    ],
)
def test_a_head_is_named_by_its_entropy_its_selectivity_and_its_largest_column(kind, numbers):
    assert one(**numbers) == (("decoder", 1, 0, kind),)


def test_the_share_particular_to_the_query_is_all_of_a_pointer_and_nothing_of_a_sink():
    rows = head(1, 0, entropy=0.0, selectivity=math.log(KEYS)) + head(1, 1, entropy=0.1, selectivity=0.0)
    found = heads_of(evidence(rows), "decoder")
    assert found[1, 0].particular == pytest.approx(1)
    assert found[1, 1].particular == 0


def test_the_number_of_keys_is_read_off_entropies_or_logits_or_another_head_or_the_batch():
    spread = head(1, 0, keys=20)
    sharp = head(1, 1, keys=20, entropy=0.0)
    blind = [row for row in head(1, 2, keys=20, entropy=0.0) if row.metric not in ("logit_std", "log_context_gauge")]
    found = heads_of(evidence([*spread, *sharp, *blind]), "decoder")
    assert [math.exp(found[1, index].log_keys) for index in range(3)] == pytest.approx([20, 20, 20])
    assert math.exp(heads_of(evidence(blind), "decoder")[1, 2].log_keys) == pytest.approx(KEYS)


def test_what_a_causal_mask_alone_gives_is_not_held_to_be_selective():
    causal = [row for index in range(2) for row in head(1, index, scope="late", entropy=0.9999, selectivity=0.052)]
    assert {kind for *_, kind in kinds(evidence(causal, causal=True))} == {"average"}
    full = head(1, 0, entropy=0.9999, selectivity=0.052)
    assert kinds(evidence(full))[0][-1] == "mixer"


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_plain_causal_averages_differ_from_their_own_average_by_a_twentieth_of_a_nat(tokens):
    from fullrank import metrics

    A = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    A = A / A.sum(-1, keepdim=True)
    late = torch.arange(tokens) >= tokens // 2
    assert float(metrics.selectivity(A, A > 0, late)) == pytest.approx(0.052, abs=0.004)


def test_heads_without_numbers_or_at_the_float_floor_have_no_kind():
    missing = [row for row in head(1, 0) if row.metric != "selectivity"]
    assert kinds(evidence(missing)) == ()
    rows = [*grid(layers=3, heads=1), floor_at(1)]
    assert [layer for _, layer, _, _ in kinds(evidence(rows))] == [1, 3]


def test_a_value_exceeds_a_limit_only_where_its_whole_interval_does():
    row = Row("decoder", 1, "stream", "out", "rms", 1.0, stderr=0.1)
    assert above(row, 0.79)
    assert not above(row, 0.81)
    assert below(row, 1.21)
    assert not below(row, 1.19)
    assert above(Row("decoder", 1, "stream", "out", "rms", 1.0), 0.999)
    half = 0.1 * 1.959964  # of nobody knows how many sequences; of few the interval is wider, as Student's is
    assert (at_least(row), at_most(row), margin(row)) == pytest.approx((1 - half, 1 + half, half))
    few = [dataclasses.replace(row, n=n) for n in (2, 3, 8, 1000)]
    assert [margin(one) for one in few] == pytest.approx([1.27062, 0.430265, 0.236462, 0.196234], rel=1e-5)
    missing = Row("decoder", 1, "stream", "out", "rms", None, note="no token is real")
    assert not above(missing, 0.0) and not below(missing, 0.0)


def test_heads_are_read_off_the_rows_once_for_each_evidence_and_stack():
    seen = evidence(grid())
    assert heads_of(seen, "decoder") is heads_of(seen, "decoder")
    assert heads_of(seen, "encoder") == {}
    assert heads_of(evidence(grid(layers=1)), "decoder").keys() == {(1, index) for index in range(4)}


def test_heads_are_said_by_layer():
    assert in_words([(2, 3), (2, 0), (4, 1)]) == "heads 0, 3 of layer 2; head 1 of layer 4"
    assert in_words([(1, n) for n in range(5)]) == "heads 0 to 4 of layer 1"
    assert in_words([(n, 0) for n in range(1, 8)], most=1) == "head 0 of layer 1; and heads of 6 more layers"


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_whose_heads_were_set_by_hand_has_the_kinds_that_were_set(causal):
    model = small(causal=causal)
    point_to_the_previous(model.blocks[0], 1)
    rest_on(model.blocks[1], 2, 0)
    named = {(layer, index): kind for _, layer, index, kind in kinds(evidence_of(model))}
    assert len(named) == 12
    assert named.pop((1, 1)) == "pointer"
    assert named.pop((2, 2)) == "sink"
    assert set(named.values()) == {"average"}
