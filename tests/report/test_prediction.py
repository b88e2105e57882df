"""What a predicted report says beside its rows survives JSON, and is told on the terminal."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from fullrank.report import Report
from fullrank.report.prediction import LeftOut, Prediction, Standing
from fullrank.report.terminal import render
from fullrank.table import Row, Table
from fullrank.theory.answer import Answer

DEEP = Answer("collapse-depth", math.inf, 40.0, math.inf, "depth", "noci", "Tokens stay apart at any depth.")
NONE = Answer("residual-scale", None, None, None, "residual_scale", "noci", "No branch scale keeps tokens apart.")
PREDICTION = Prediction(
    {"depth": 2, "width": 8},
    "2 blocks of width 8",
    (Standing("noci", "residual branches", 0.5, (("attention is uniform", 0.5),)), Standing("dong", "paths", 0.25)),
    (LeftOut("batchnorm", "batch norm", ("its norms are layernorm",)),),
    (DEEP, NONE),
)


def report(prediction=PREDICTION):
    rows = [Row("decoder", n, "stream", "out", "similarity", n / 4, source="theory:noci", n=None) for n in range(3)]
    return Report(Table(rows), {"model": "toy"}, prediction=prediction)


def lines(one, *, width=100, ascii_only=False):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in render((one,), ("",), width=width, ascii_only=ascii_only):
        console.print(part)
    return console.file.getvalue()


def test_it_survives_json_infinities_included():
    one = report()
    again = Report.from_json(one.to_json())
    assert again == one
    assert again.prediction == PREDICTION
    assert Report.from_json(report(None).to_json()).prediction is None


def test_the_primary_theory_is_the_first_and_none_where_none_speaks():
    assert report().primary == "theory:noci"
    assert report(Prediction(left_out=PREDICTION.left_out)).primary is None
    assert report(None).primary is None


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_tells_who_speaks_how_well_and_who_was_left_out(width):
    said = " ".join(lines(report(), width=width).split())
    assert "2 blocks of width 8." in said
    assert said.index("noci") < said.index("dong") < said.index("batchnorm")
    assert "in part: attention is uniform (0.500)" in said
    assert "Tokens stay apart at any depth (between 40.0 and ∞) [noci]" in said
    assert "No branch scale keeps tokens apart [noci]" in said
    assert "its norms are layernorm" in said
    assert "--overlay" in said
    assert "fullrank explain" not in said
    assert max(map(len, lines(report(), width=width).splitlines())) <= width


def test_a_plain_terminal_is_given_plain_signs():
    said = lines(report(), ascii_only=True)
    assert "inf" in said
    assert said.isascii()


def test_a_notebook_shows_the_architecture_the_standings_and_the_answers():
    said = report()._repr_html_()
    places = [said.index(words) for words in ("2 blocks of width 8.", "<b>noci</b>", "Tokens stay apart at any depth")]
    assert places == sorted(places)
    assert "<script" not in said
