"""Several variants as one report: nothing is lost, nothing is mixed, and what is drawn is what the reports hold."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fullrank.errors import TableError
from fullrank.report import Report, Variants
from fullrank.report.changes import largest_changes
from fullrank.table import COLUMNS, Row, Table
from report.synthetic import report

LABELS = ("checkpoint-500", "checkpoint-1000", "checkpoint-1500")


def variant(index, *, layers=3):
    made = report(model=f"run/{index}", layers=layers, heads=2, tokens=16, causal=True, seed=index, spectra=False)
    return replace(made, rows=made.rows.map(lambda row: scaled(row, 0.5**index)))


def scaled(row, factor):
    return replace(row, value=row.value * factor) if row.metric == "token_energy" and row.value is not None else row


@pytest.fixture(scope="module")
def variants():
    failed = [("checkpoint-2000", "the weights are not finite.")]
    return Variants.of([variant(i) for i in range(3)], LABELS, failed=failed, notes=["they read different tokens."])


def shown(variants, width=100, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(variants)
    return console.file.getvalue()


def test_the_table_is_every_report_with_its_variant_before_the_twelve_columns(variants):
    table = variants.table
    assert list(table) == ["variant", *COLUMNS]
    for label, one in zip(LABELS, variants.reports, strict=True):
        mine = table[table.variant == label].drop(columns="variant").reset_index(drop=True)
        assert mine.equals(one.table)
    assert len(table) == sum(len(one.rows) for one in variants.reports)


def test_the_pivot_is_variants_by_layers(variants):
    frame = variants.pivot("token_energy")
    assert list(frame.index) == list(LABELS)
    for label, one in zip(LABELS, variants.reports, strict=True):
        assert list(frame.loc[label]) == list(one.pivot("token_energy", site="stream", scope="late")["out"])


def test_of_heads_the_pivot_is_the_mean(variants):
    frame = variants.pivot("normalized_entropy", scope="late")
    for label, one in zip(LABELS, variants.reports, strict=True):
        expected = one.pivot("normalized_entropy", scope="late").mean(axis=1)
        assert np.allclose(frame.loc[label].astype(float), expected.astype(float))


def test_json_and_files_bring_everything_back(variants, tmp_path):
    assert Variants.from_json(variants.to_json()) == variants
    assert Variants.load(variants.save_json(tmp_path / "series.json")) == variants


@pytest.mark.parametrize("text", ["{}", "nonsense", '{"variants": [], "schema": 9}', '{"variants": [], "schema": 1}'])
def test_what_holds_no_variants_is_refused_in_one_sentence(text):
    with pytest.raises(TableError):
        Variants.from_json(text)


def test_a_report_is_no_series_and_a_series_no_report(variants):
    with pytest.raises(TableError, match="read by Report"):
        Variants.from_json(variants.reports[0].to_json())
    with pytest.raises(TableError):
        Report.from_json(variants.to_json())


def test_labels_are_one_different_name_each(variants):
    with pytest.raises(TableError, match="different names"):
        Variants.of(variants.reports, ["a", "a", "b"])
    assert variants["checkpoint-1000"] is variants.reports[1]
    with pytest.raises(TableError, match="checkpoint-500"):
        variants["none"]


def test_lines_draw_the_pivot_a_line_per_layer_with_error_bars(variants):
    figure, frame = variants.figure("token_energy", view="lines"), variants.pivot("token_energy")
    assert [one.name for one in figure.data] == [f"layer {layer}" for layer in frame.columns]
    for one, layer in zip(figure.data, frame.columns, strict=True):
        assert np.allclose(one.y, frame[layer].astype(float), rtol=1e-5)
        stderr = [
            r.rows.where(metric="token_energy", layer=layer, scope="late", site="stream", part="out").rows[0].stderr
            for r in variants.reports
        ]
        assert np.allclose(one.error_y.array, stderr, rtol=1e-5)
    assert list(figure.layout.xaxis.ticktext) == ["500", "1000", "1500"]
    assert figure.layout.xaxis.title.text == "checkpoint-…"


def test_the_sheet_draws_the_pivot_as_colours_first_variant_on_top(variants):
    (heat,) = variants.figure("token_energy", view="sheet").data
    assert np.allclose(np.array(heat.z, dtype=float), variants.pivot("token_energy").astype(float), rtol=1e-5)
    low, high = variants.figure("token_energy", view="sheet").layout.yaxis.range
    assert low > high


def test_few_variants_are_drawn_over_depth_and_many_as_a_sheet(variants):
    assert {one.type for one in variants.figure("token_energy").data} == {"scatter"}
    many = Variants.of([variant(i, layers=2) for i in range(8)], [str(i) for i in range(8)])
    assert [one.type for one in many.figure("token_energy").data] == ["heatmap"]
    with pytest.raises(TableError, match="depth, sheet, lines"):
        variants.figure("token_energy", view="other")


def test_many_variants_over_depth_go_from_pale_to_dark_and_show_block_outputs_alone():
    many = Variants.of([variant(i, layers=2) for i in range(8)], [str(i) for i in range(8)])
    data = many.figure("rms", view="depth").data
    assert len(data) == 8
    brightness = [int(one.line.color[1:3], 16) for one in data]
    assert brightness == sorted(brightness, reverse=True)


def row(layer, value, stderr, metric="similarity"):
    return Row("encoder", layer, "stream", "out", metric, value, stderr=stderr, n=8)


def test_the_largest_changes_are_those_beyond_two_standard_errors_by_share_of_scale():
    before = Report(
        Table([row(0, 0.1, 0.01), row(1, 0.2, 0.01), row(1, 10.0, 0.1, "stable_rank"), row(1, 0.5, 0.3, "residual")])
    )
    after = Report(
        Table([row(0, 0.15, 0.01), row(1, 0.5, 0.01), row(1, 2.0, 0.1, "stable_rank"), row(1, 0.1, 0.3, "residual")])
    )
    changes = largest_changes(before, after)
    assert [(one.metric, one.layer) for one in changes] == [("stable_rank", 1), ("similarity", 1)]
    assert [one.share for one in changes] == [pytest.approx(0.8), pytest.approx(0.3)]
    assert changes[0].words == "10.0 → 2.00"


def test_equal_reports_have_no_changes(variants):
    assert largest_changes(variants.reports[0], variants.reports[0]) == []
    same = Variants.of([variants.reports[0]] * 2, ["a", "b"])
    assert "none that exceeds" in shown(same)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_says_what_failed_and_what_changed_within_its_width(variants, width):
    text = shown(variants, width)
    assert max(map(len, text.splitlines())) <= width
    for words in ("3 variants", "not examined", "checkpoint-2000", "largest changes", "token_energy", "they read"):
        assert words in " ".join(text.split()), words


def test_variants_of_different_depth_stand_side_by_side():
    both = Variants.of([variant(0, layers=2), variant(1, layers=4)], ["two", "four"])
    frame = both.pivot("token_energy")
    assert list(frame.columns) == [0, 1, 2, 3, 4]
    assert frame.loc["two"].isna().sum() == 2
    assert both.figure("token_energy", view="lines").data[4].y[0] is None
