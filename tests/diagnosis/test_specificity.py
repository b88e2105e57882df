"""How the table of false alarms is made: limits moved one by one, and what is then said of the same numbers."""

import math

import pytest
from depth_rows import Told, evidence, over_depth

from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.dead_depth import FAILURE as DEAD
from fullrank.diagnosis.thresholds import threshold
from fullrank.diagnosis.vanishing import FAILURE as VANISHING
from healthy.examining import examined
from healthy.models import Healthy
from healthy.sensitive import Reading, moved, readings, recorded, set_to
from healthy.table import Alarms, alarms, alarms_table, read

SHARE = "dead-depth.update_share"


class Seen:
    """An outcome as the table reads it."""

    def __init__(self, **of):
        self.readings = {name.replace("__", "."): reading for name, reading in of.items()}


def updates(*values):
    cosines = [1 - value**2 / 2 for value in values]
    return [*over_depth("update_share", values, start=1), *over_depth("neighbour_cosine", cosines, start=1)]


@pytest.mark.parametrize(
    ("value", "lower", "higher"),
    [
        (0.05, 0.025, 0.1),
        (0.98, 0.96, 0.99),
        (0.5, 0.25, 1.0),
        (-0.5, -1.0, -0.25),
        (30.0, 15.0, 60.0),
        (1.0, 0.5, 2.0),
    ],
)
def test_a_limit_is_moved_by_a_factor_of_two_of_what_it_is_or_of_what_it_leaves_to_one(value, lower, higher):
    assert math.isclose(moved(value, "lower"), lower)
    assert math.isclose(moved(value, "higher"), higher)


def test_moving_a_limit_moves_what_is_read_and_nothing_afterwards():
    before = THRESHOLDS[SHARE].value
    with set_to(SHARE, 0.5):
        assert threshold(SHARE) == 0.5
    assert threshold(SHARE) == THRESHOLDS[SHARE].value == before
    with recorded() as names:
        threshold(SHARE)
    assert names == {SHARE}


def test_a_block_a_little_above_the_limit_is_an_alarm_where_the_limit_is_twice_as_sensitive():
    found = readings(evidence(updates(0.5, 0.4, 0.07, 0.5, 0.6)), [DEAD, VANISHING], Told())
    assert found[SHARE] == Reading("", {"lower": "", "higher": "warn"})


def test_a_suspicion_that_a_moved_limit_raises_is_tested_like_any_other():
    found = readings(evidence(updates(0.5, 0.4, 0.07, 0.5, 0.6)), [DEAD], Told(otherwise=1.0))
    assert found[SHARE] == Reading("", {"lower": "", "higher": ""})


def test_limits_that_no_failure_reads_are_not_among_the_readings():
    found = readings(evidence(updates(0.5, 0.4, 0.3, 0.5, 0.6)), [DEAD], Told())
    assert SHARE in found
    assert not [name for name in found if name.startswith(("effect.", "sinks.", "numerics."))]
    suspected = readings(evidence(updates(0.5, 0.4, 0.01, 0.5, 0.6)), [DEAD], Told())
    assert suspected["effect.loss"].at_its_value == "warn"
    assert suspected["effect.loss"].beside["higher"] == "warn"


def test_the_graver_side_stands_in_the_table_and_is_read_again_from_it():
    name = SHARE.replace(".", "__")
    outcomes = [
        Seen(**{name: Reading("", {"lower": "", "higher": "warn"})}),
        Seen(**{name: Reading("note", {"lower": "note", "higher": "fail"})}),
        Seen(**{name: Reading("", {"lower": "note", "higher": ""})}),
        Seen(),
    ]
    line = alarms(THRESHOLDS[SHARE], outcomes)
    assert (line.held, line.moved) == (3, "0.1")
    assert (line.now, line.then) == (Alarms(1, 0, 0), Alarms(0, 1, 1))
    unread = alarms(THRESHOLDS["sinks.few"], outcomes)
    assert unread.held == 0
    lines = {SHARE: line, "sinks.few": unread}
    again = read("\n".join(["# A page", "", *alarms_table(lines)]))
    assert again[SHARE] == line
    assert again["sinks.few"].held == 0


def test_where_both_sides_say_the_same_both_are_named():
    line = alarms(THRESHOLDS[SHARE], [Seen(**{SHARE.replace(".", "__"): Reading("", {"lower": "", "higher": ""})})])
    assert line.moved == "0.025 and 0.1"


def test_a_healthy_family_is_examined_and_looked_at_again_with_nothing_said():
    found = examined(Healthy("drawn", "gpt2"))
    assert (found.refused, found.weights, found.misjudged) == ("", "fresh", False)
    assert not [severity for severity, _, _ in found.said if severity != "note"]
    assert {"freshness.deviation", "redundant-heads.similarity", "rank-collapse-depth.fall"} <= set(found.readings)
