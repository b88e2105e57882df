"""A report survives its JSON bit for bit, and what is no report is refused in one sentence."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.errors import OutputError, TableError
from fullrank.report import HeadSpectrum, Report
from fullrank.table import Row, Table
from report.synthetic import report

numbers = st.floats(allow_nan=False)
words = st.text(max_size=12)
leaves = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | numbers | words
abouts = st.dictionaries(
    words,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)),
    max_size=4,
)
rows = st.builds(
    Row,
    stack=words,
    layer=st.integers(0, 5),
    site=st.sampled_from(["stream", "read", "attention", "mlp"]),
    part=words,
    metric=words,
    value=st.none() | numbers,
    head=st.none() | st.integers(0, 3),
    scope=words,
    stderr=st.none() | numbers,
    n=st.none() | st.integers(1, 9),
    exact=st.booleans(),
    source=words,
    note=st.text(min_size=1, max_size=12),
)
spectra = st.builds(
    HeadSpectrum,
    stack=words,
    layer=st.integers(1, 5),
    part=words,
    head=st.integers(0, 3),
    values=st.lists(numbers, max_size=4).map(tuple),
    tokens=st.integers(1, 9),
    complete=st.booleans(),
    null=st.none() | st.lists(numbers, max_size=4).map(tuple),
    inverse_participation=numbers,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(rows, max_size=5, unique_by=lambda row: row.key), abouts, st.lists(spectra, max_size=3).map(tuple))
def test_json_round_trip_keeps_rows_description_and_spectra_exactly(rows, about, spectra):
    before = Report(rows=Table(rows), about=about, spectra=spectra)
    text = before.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Report.from_json(text) == before


def test_a_saved_report_loads_as_the_same_report(tmp_path):
    before = report(layers=2, heads=2, tokens=8)
    assert Report.load(before.save_json(tmp_path / "report.json")) == before


def test_an_unknown_number_of_a_spectrum_survives(tmp_path):
    spectrum = HeadSpectrum("encoder", 1, "self", 0, (1.0, math.inf), 2, True, None, math.nan)
    again = Report.from_json(Report(rows=Table(), spectra=(spectrum,)).to_json()).spectra[0]
    assert again.values == (1.0, math.inf)
    assert math.isnan(again.inverse_participation)
    assert math.isnan(again.edge)
    assert again.outliers is None


def test_another_schema_version_is_refused():
    document = json.loads(report(layers=1, heads=1, tokens=4).to_json()) | {"schema": 2}
    with pytest.raises(TableError, match="schema version 2 found; this fullrank reads 1"):
        Report.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"schema": 1, "rows": []}',
        '{"schema": 1, "rows": [], "about": []}',
        '{"schema": 1, "rows": [], "about": {}, "spectra": [{"stack": "encoder"}]}',
        '{"schema": 1, "rows": [], "about": {}, "spectra": [3]}',
    ],
)
def test_text_that_is_no_report_is_refused_in_one_sentence(text):
    with pytest.raises(TableError) as error:
        Report.from_json(text)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(TableError, match="cannot be read: No such file"):
        Report.load(tmp_path / "missing.json")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(TableError, match="not UTF-8"):
        Report.load(tmp_path / "picture.png")


@pytest.mark.parametrize("save", ["save_json", "save_html"])
def test_an_unwritable_path_is_one_sentence_and_leaves_nothing(save, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        getattr(report(layers=1, heads=1, tokens=4), save)(tmp_path / "missing" / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_json_cannot_hold_is_refused_by_name():
    with pytest.raises(TableError, match=r"about\['model'\] is a PosixPath"):
        Report(rows=Table(), about={"model": Path("weights")})


def test_the_table_has_the_twelve_columns_and_notes_say_why():
    made = report(layers=6, heads=4, tokens=8)
    assert len(made.table.columns) == 12
    assert set(made.notes["metric"]) == {"span_novelty", "attention_s2"}
    assert made.verdicts == ()
