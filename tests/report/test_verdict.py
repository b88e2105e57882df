"""Verdicts as data: their order, and that a report loses nothing of them in a file."""

import json
import math

import pytest

from fullrank.errors import TableError
from fullrank.report import Report, Variants
from fullrank.report.verdict import Comparison, Diagnosis, Effect, Severity
from fullrank.table import Table
from report.diagnosed import diagnosed, diagnosis, verdict


def test_severities_are_ordered_by_gravity_and_are_their_own_words():
    assert [one.rank for one in (Severity.NOTE, Severity.WARN, Severity.FAIL)] == [0, 1, 2]
    assert [f"{one}" for one in Severity] == ["note", "warn", "fail"]
    assert Severity("warn") is Severity.WARN


@pytest.mark.parametrize(
    ("severities", "worst"),
    [((), None), (("note",), "note"), (("note", "fail", "warn"), "fail"), (("warn", "note"), "warn")],
)
def test_the_worst_is_the_gravest_wherever_it_stands(severities, worst):
    verdicts = tuple(verdict(severity=Severity(one)) for one in severities)
    assert Diagnosis(verdicts).worst == worst


def test_a_ratio_is_of_what_was_expected_and_missing_where_that_is_nothing():
    assert Comparison("rms", "encoder layer 1", 3.0, None, "initialisation", 2.0).ratio == 1.5
    assert Comparison("rms", "encoder layer 1", 3.0).ratio is None
    assert Comparison("rms", "encoder layer 1", 3.0, None, "null", 0.0).ratio is None


@pytest.mark.parametrize(
    ("outcome", "unit"),
    [("loss", "of loss"), ("distribution", "nats of KL"), ("state", "of the final state's variance")],
)
def test_every_outcome_has_its_unit(outcome, unit):
    assert Effect("layer 1 skipped", outcome, 0.0, 0.0, 0.0, 8).unit == unit


@pytest.mark.parametrize(
    "one",
    [
        Diagnosis(),
        diagnosis(),
        diagnosis(kinds=(("encoder", 1, 0, "pointer"), ("decoder", 2, 3, "sink"))),
        diagnosis(verdicts=(verdict(effects=(Effect("layer 1 skipped", "loss", math.inf, 0.0, math.inf, 8),)),)),
    ],
    ids=["empty", "full", "kinds", "infinite"],
)
def test_a_diagnosis_is_the_same_after_a_file(one, tmp_path):
    made = Report(rows=Table(), diagnosis=one)
    found = Report.load(made.save_json(tmp_path / "report.json"))
    assert found == made
    assert found.diagnosis == one
    assert found.verdicts == one.verdicts
    assert all(isinstance(verdict.severity, Severity) for verdict in found.verdicts)


def test_reference_and_diagnosis_survive_in_reports_and_in_variants():
    made = diagnosed()
    again = Report.from_json(made.to_json())
    assert again.reference == made.reference
    assert again == made
    both = Variants.of([made, Report(rows=made.rows)], ["a", "b"])
    found = Variants.from_json(both.to_json())
    assert found.reports == both.reports
    assert found["b"].diagnosis is None
    assert found["b"].verdicts == ()


def test_a_report_without_a_diagnosis_has_none_in_its_file():
    content = json.loads(Report(rows=Table()).to_json())
    assert not {"diagnosis", "reference"} & set(content)


def broken(change):
    """The record of a full diagnosis with one thing changed."""
    record = json.loads(json.dumps(diagnosis(kinds=(("encoder", 1, 0, "pointer"),)).to_record()))
    change(record)
    return record


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("verdicts"),
        lambda record: record.pop("reference"),
        lambda record: record.pop("kinds"),
        lambda record: record["verdicts"][0].update(severity="dreadful"),
        lambda record: record["verdicts"][0].pop("claim"),
        lambda record: record["verdicts"][0].update(more=1),
        lambda record: record["verdicts"][0].update(heads=[[1, 2, 3]]),
        lambda record: record["verdicts"][0]["effects"][0].pop("n"),
        lambda record: record["verdicts"].append("dead-depth"),
        lambda record: record["clear"].append({"name": "numerics"}),
        lambda record: record["kinds"].append(["encoder", 1]),
    ],
)
def test_a_record_that_is_no_diagnosis_is_refused_with_a_sentence(change):
    content = json.loads(Report(rows=Table()).to_json()) | {"diagnosis": broken(change)}
    with pytest.raises(TableError, match=r"^this is no diagnosis: .+\.$"):
        Report.from_json(json.dumps(content))


@pytest.mark.parametrize("diagnosis", [[], "sound", 3])
def test_what_is_no_record_at_all_is_refused(diagnosis):
    content = json.loads(Report(rows=Table()).to_json()) | {"diagnosis": diagnosis}
    with pytest.raises(TableError, match="no diagnosis"):
        Report.from_json(json.dumps(content))


def test_a_reference_that_is_no_report_is_refused():
    content = json.loads(Report(rows=Table()).to_json()) | {"reference": {"rows": []}}
    with pytest.raises(TableError):
        Report.from_json(json.dumps(content))
