"""Suspicions that are tested one by one are said as one: of each stack and severity, and as grave as its own tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from depth_rows import Told, evidence, over_depth

from fullrank.diagnosis import Failure, Intervention, Looked, Suspicion, Test, diagnose
from fullrank.report.verdict import Severity

LIMITS = (("loss", 0.01),)
WORDS = dict.fromkeys(("title", "means", "harmless", "tested", "refuted_by", "command"), "")


def skipped(stack, *layers):
    return Test(Intervention("skip-block", stack, layers[0], also=layers[1:]), "no effect", LIMITS)


def part(layer, stack="encoder"):
    return Suspicion("alone", stack, Severity.WARN, layers=(layer,), tests=(skipped(stack, layer),))


def join(_, parts, refuted):
    layers = tuple(one.layers[0] for one in parts)
    left_out = "".join(f" without {one.stack} {one.layers[0]}" for one in refuted)
    each = Suspicion(f"each{left_out}", parts[0].stack, parts[0].severity, layers=layers)
    if parts[0].severity is Severity.NOTE:
        return (each,)
    together = (skipped(parts[0].stack, *layers),)
    return replace(each, claim=f"together{left_out}", severity=Severity.FAIL, tests=together), each


def said(*parts, tester):
    failure = Failure("f", **WORDS, papers=(), valid_for="any", look=lambda _: Looked(parts), join=join)
    found = diagnose(evidence(over_depth("rms", [1.0])), [failure], tester=tester)
    return [(one.claim, one.stack, one.severity, one.layers, len(one.effects)) for one in found.verdicts], found


def test_untested_they_are_one_note():
    found, _ = said(part(1), part(2), tester=None)
    assert found == [("each", "encoder", Severity.NOTE, (1, 2), 0)]


def test_what_claims_more_than_its_parts_holds_where_its_own_test_confirms_it():
    found, _ = said(part(1), part(2), tester=Told())
    assert found == [("together", "encoder", Severity.FAIL, (1, 2), 3)]


@pytest.mark.parametrize(("change", "effects"), [(0.5, 3), (0.01, 3), ("too large.", 2)])
def test_where_it_does_not_the_parts_are_said_as_they_came_out_with_what_was_seen(change, effects):
    found, diagnosis = said(part(1), part(2), tester=Told(effects={(1, 2): change}))
    assert found == [("each", "encoder", Severity.WARN, (1, 2), effects)]
    assert bool(diagnosis.unchecked) == (effects == 2)


def test_a_refuted_part_is_left_out_and_told_to_those_of_its_stack_alone():
    parts = (part(1), part(2), part(3), part(4, "decoder"))
    found, diagnosis = said(*parts, tester=Told(effects={(2,): 0.5}))
    assert found == [
        ("together without encoder 2", "encoder", Severity.FAIL, (1, 3), 3),
        ("together", "decoder", Severity.FAIL, (4,), 2),
    ]
    assert diagnosis.clear == ()


def test_those_of_which_nothing_could_be_told_are_a_note_of_their_own():
    found, _ = said(part(1), part(2), part(3), tester=Told(effects={(2,): 0.01}))
    assert [(one[2], one[3]) for one in found] == [(Severity.FAIL, (1, 3)), (Severity.NOTE, (2,))]


def test_where_all_are_refuted_it_is_clear():
    found, diagnosis = said(part(1), part(2), tester=Told(otherwise=0.5))
    assert found == []
    assert "refuted" in diagnosis.clear[0].words
