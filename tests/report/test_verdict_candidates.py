"""What a verdict says of remedies: shown where it is grave, kept in records, and left out of a note."""

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from fullrank.report.verdict import Diagnosis, Severity
from report.diagnosed import diagnosed, diagnosis, verdict

TRIED = ("layernorm-scaling", "temperature?kind=log-context", "residual-scale", "peri-norm")
COMMAND = "fullrank screen ./here"


def with_candidates(severity):
    return diagnosed(verdicts=(verdict(severity=severity, candidates=TRIED, screen=COMMAND),))


def shown(made, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(made)
    return " ".join(file.getvalue().split())


@pytest.mark.parametrize("severity", [Severity.WARN, Severity.FAIL])
def test_the_terminal_names_the_first_three_and_the_command_that_tries_them(severity):
    said = shown(with_candidates(severity))
    assert "remedies, such as layernorm-scaling, temperature, residual-scale: fullrank screen ./here" in said
    assert "peri-norm" not in said


@pytest.mark.parametrize("severity", [Severity.WARN, Severity.FAIL])
def test_the_page_names_all_of_them_with_their_parameters(severity):
    page = with_candidates(severity).to_html()
    assert "Remedies to try: layernorm-scaling, temperature?kind=log-context, residual-scale, peri-norm" in page
    assert "<code>fullrank screen ./here</code>" in page


def test_a_note_calls_for_no_remedy():
    made = with_candidates(Severity.NOTE)
    assert "remedies, such as" not in shown(made)
    assert "Remedies to try" not in made.to_html()


def test_a_verdict_without_candidates_says_nothing_of_remedies():
    made = diagnosed(verdicts=(verdict(severity=Severity.FAIL),))
    assert "remedies, such as" not in shown(made)
    assert "Remedies to try" not in made.to_html()


def test_candidates_are_in_the_record_and_a_record_without_them_is_read():
    made = diagnosis(verdicts=(verdict(candidates=TRIED, screen=COMMAND),))
    record = made.to_record()
    assert Diagnosis.from_record(record) == made
    assert Diagnosis.from_record(record).verdicts[0].candidates == TRIED
    older = asdict(diagnosis())
    for one in older["verdicts"]:
        del one["candidates"], one["screen"]
    assert [(one.candidates, one.screen) for one in Diagnosis.from_record(older).verdicts] == [((), "")] * 3
