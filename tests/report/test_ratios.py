"""Every number beside its references, against a plain loop over the rows."""

import math

import pandas
import pytest

from fullrank.report import Report
from fullrank.table import Row, Table
from report.diagnosed import diagnosed

PLACE = ["stack", "layer", "site", "part", "head", "scope", "metric"]


def place(row):
    return tuple(getattr(row, name) for name in PLACE)


def table(made):
    """By place: value, initialisation, null and both ratios."""
    return {
        tuple(None if value is pandas.NA else value for value in line[: len(PLACE)]): tuple(line[len(PLACE) :])
        for line in made.ratios[[*PLACE, *NUMBERS]].itertuples(index=False)
    }


NUMBERS = ["value", "initialisation", "null", "to_initialisation", "to_null"]


def same(one, other):
    return math.isnan(one) if other is None else one == other


def test_every_number_stands_beside_the_same_number_of_the_initialisation():
    made = diagnosed()
    found = table(made)
    expected = {place(row): row.value for row in made.reference.rows}
    assert set(found) == {place(row) for row in made.rows if row.value is not None}
    for row in made.rows:
        if row.value is None:
            continue
        value, initialisation, _, ratio, _ = found[place(row)]
        assert value == row.value
        assert same(initialisation, expected.get(place(row)))
        assert math.isnan(ratio) or ratio == pytest.approx(2.0)


def test_the_null_is_of_the_stream_at_its_headline_scope():
    rows = [Row("decoder", 1, "stream", "out", "residual", 0.5, scope=scope, n=8) for scope in ("all", "late")] + [
        Row("decoder", 1, "attention", "self", "residual", 0.5, head=0, n=8)
    ]
    made = Report(rows=Table(rows), about={"nulls": {"decoder": {"residual": 0.25}, "encoder": {"residual": 9.0}}})
    nulls = {(row.site, row.scope): row.null for row in made.ratios.itertuples()}
    assert nulls["stream", "late"] == 0.25
    assert math.isnan(nulls["stream", "all"])
    assert math.isnan(nulls["attention", "all"])
    assert [row.to_null for row in made.ratios.itertuples() if row.null == 0.25] == [2.0]


@pytest.mark.parametrize("other", [0.0, None])
def test_there_is_no_ratio_to_nothing(other):
    row = Row("encoder", 1, "stream", "out", "rms", 3.0, n=8)
    at = Row("encoder", 1, "stream", "out", "rms", other, n=8, source="initialisation", note="" if other else "none")
    made = Report(rows=Table([row]), reference=Report(rows=Table([at])))
    assert made.ratios["to_initialisation"].isna().all()


def test_without_references_the_columns_are_there_and_empty():
    made = Report(rows=Table([Row("encoder", 1, "stream", "out", "rms", 3.0, n=8)]))
    assert list(made.ratios.columns) == [*made.ratios.columns[: len(PLACE)], *NUMBERS]
    assert made.ratios[NUMBERS[1:]].isna().all(axis=None)
    assert Report(rows=Table()).ratios.empty
