"""`fullrank explain`: every verdict in a line, one in full, both as JSON."""

import json

import pytest

from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.catalogue import FAILURES


def words(text):
    return " ".join(text.split())


def test_all_verdicts_are_listed_with_their_titles(fullrank):
    result = fullrank("explain")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [words(line) for line in result.stdout.splitlines()]
    for failure in FAILURES:
        assert any(line.startswith(failure.name) for line in lines), failure.name
    assert "fullrank explain VERDICT" in result.stdout


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_one_verdict_is_explained_in_full(fullrank, failure):
    result = fullrank("explain", failure.name)
    assert (result.exit_code, result.stderr) == (0, "")
    # columns wrap: letters and digits in their order, no matter where a line ends
    said = "".join(result.stdout.split())
    assert said.startswith("".join(f"{failure.name}: {failure.title}".split()))
    for text in (failure.means, failure.harmless, failure.tested, failure.refuted_by, *failure.papers):
        assert "".join(text.split()) in said
    limits = [one for name, one in THRESHOLDS.items() if name.startswith(f"{failure.name}.")]
    for one in limits:
        assert "".join(one.reason.split()) in said
    assert "{model}" not in result.stdout


def test_a_name_that_is_close_is_answered_with_the_right_one(fullrank):
    result = fullrank("explain", "dead-dept")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "'dead-dept' is no verdict" in result.stderr
    assert "did you mean 'dead-depth'" in result.stderr
    for failure in FAILURES:
        assert failure.name in result.stderr


def test_a_name_that_is_close_to_none_is_answered_with_all(fullrank):
    result = fullrank("explain", "qqq")
    assert result.exit_code == 2
    assert "did you mean" not in result.stderr
    assert FAILURES[0].name in result.stderr


def test_json_holds_every_field_of_every_verdict(fullrank):
    records = json.loads(fullrank("explain", "--json").stdout)
    assert [record["name"] for record in records] == [failure.name for failure in FAILURES]
    for record, failure in zip(records, FAILURES, strict=True):
        assert record["title"] == failure.title
        assert record["means"] == failure.means
        assert record["valid_for"] == failure.valid_for
        assert record["papers"] == list(failure.papers)
        assert record["command"] == failure.command.replace("{model}", "SPEC")
        for one in record["thresholds"]:
            known = THRESHOLDS[one["name"]]
            assert (one["value"], one["unit"], one["reason"]) == (known.value, known.unit, known.reason)


def test_json_of_one_is_its_record(fullrank):
    every = {record["name"]: record for record in json.loads(fullrank("explain", "--json").stdout)}
    assert json.loads(fullrank("explain", "sinks", "--json").stdout) == every["sinks"]


def test_every_threshold_of_a_verdict_is_in_exactly_one_record(fullrank):
    records = json.loads(fullrank("explain", "--json").stdout)
    named = [one["name"] for record in records for one in record["thresholds"]]
    shared = [name for name in THRESHOLDS if name.split(".")[0] in ("effect", "freshness", "kinds", "sure")]
    assert sorted(named + shared) == sorted(THRESHOLDS)
