"""Several variants as one report: nothing is lost, nothing is mixed, and what is drawn is what the reports hold."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fullrank.errors import TableError
from fullrank.report import Report, Variants
from fullrank.report.changes import largest_changes
from fullrank.report.courses import courses
from fullrank.table import COLUMNS, Row, Table, context_of
from report.synthetic import REASON, report, with_contexts

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


@pytest.mark.parametrize(
    ("place", "record"),
    [
        ("variants", {"variant": "a"}),
        ("variants", {"report": {}}),
        ("variants", {"variant": "a", "report": {}}),
        ("variants", "a"),
        ("failed", {"label": "b"}),
        ("failed", ["b", "a reason"]),
    ],
)
def test_a_record_that_is_no_variant_is_refused_in_one_sentence(variants, place, record):
    content = json.loads(variants.to_json())
    content[place].append(record)
    with pytest.raises(TableError) as error:
        Variants.from_json(json.dumps(content))
    assert "\n" not in str(error.value)


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


def title(figure, view):
    return figure.layout.title.text if view == "sheet" else figure.layout.yaxis.title.text


@pytest.mark.parametrize("view", ["sheet", "lines"])
def test_the_scope_that_is_said_is_the_one_of_the_place_that_is_drawn(view):
    sides = [report(layers=2, heads=2, tokens=8, causal=causal, spectra=False) for causal in (False, True)]
    both = Report(Table([*sides[0].rows, *sides[1].rows]))
    two = Variants.of([both, both], ["a", "b"])
    assert title(two.figure("similarity", view=view, stack="encoder"), view) == "similarity"
    assert title(two.figure("similarity", view=view, stack="decoder"), view) == "similarity, late"


@pytest.mark.parametrize("view", ["sheet", "lines"])
def test_variants_are_drawn_over_the_tokens_that_all_of_them_have(view):
    causal = report(layers=2, heads=2, tokens=8, causal=True, spectra=False)
    plain = Report(Table(row for row in causal.rows if row.scope == "all"))
    two = Variants.of([causal, plain], ["causal", "plain"])
    assert title(two.figure("similarity", view=view), view) == "similarity"
    frame, expected = two.pivot("similarity"), list(causal.pivot("similarity", scope="all", site="stream")["out"])
    assert [list(frame.loc[label]) for label in ("causal", "plain")] == [expected, expected]
    late = Report(Table(row for row in causal.rows if row.scope == "late"))
    with pytest.raises(TableError, match=r"no scope that all variants have \(a: late; b: all\); pass scope="):
        Variants.of([late, plain], ["a", "b"]).figure("similarity", view=view)
    assert list(Variants.of([late, plain], ["a", "b"]).pivot("similarity", scope="late").loc["b"].isna()) == [True] * 3


def test_what_no_variant_has_is_one_sentence_that_says_what_there_is(variants):
    with pytest.raises(TableError, match="metric='nonsense' is not in this report; it has"):
        variants.pivot("nonsense")
    with pytest.raises(TableError, match="no rows of 'rms' with stack='encoder'; there are"):
        variants.pivot("rms", stack="encoder")


def test_the_page_draws_each_number_of_whole_sequences_once_and_names_its_place():
    reports = [with_contexts(layers=4, heads=2, seed=seed) for seed in (0, 1)]
    made = Variants.of(reports, ["a", "b"])
    drawn = {(one["metric"], one["place"], one["scope"]): one for one in courses(made)["figures"]}
    assert len(drawn) == len(courses(made)["figures"])
    assert drawn.keys() == {
        (row.metric, named(row), row.scope) for one in reports for row in one.rows if context_of(row.scope) is None
    }
    for scope in ("late", "all"):
        figure, frame = drawn["rms", "decoder · block output", scope]["figure"], made.pivot("rms", scope=scope)
        expected = [pytest.approx(list(frame[layer]), rel=1e-5) for layer in frame.columns]
        assert [one["y"] for one in figure["data"]] == expected


def named(row):
    places = {"out": "read by attention (after the norm)", "mid": "read by the MLP (after the norm)"}
    if row.site == "read":
        return f"decoder · {places[row.part]}"
    stream = {"out": "block output", "mid": "between attention and MLP"}
    return f"decoder · {stream[row.part]}" if row.site == "stream" else "decoder · self attention, mean over heads"


def tensors(factor):
    names = {layer: f"h.{layer - 1}.c_proj.weight" for layer in (1, 2, 3)}
    found = [Row("decoder", n, "gradient", name, "gradient_norm", factor * n, stderr=0.1) for n, name in names.items()]
    return Report(Table(found))


def test_tensors_called_alike_in_every_layer_are_one_course_over_depth():
    made = Variants.of([tensors(1.0), tensors(2.0)], ["a", "b"])
    (one,) = courses(made)["figures"]
    assert one["place"] == "decoder · h.*.c_proj.weight"
    assert [line["y"] for line in one["figure"]["data"]] == [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]
    assert list(made.pivot("gradient_norm").loc["b"]) == [2.0, 4.0, 6.0]
    assert list(made.pivot("gradient_norm", part="h.*.c_proj.weight").columns) == [1, 2, 3]
    assert list(made.pivot("gradient_norm", part="h.1.c_proj.weight").columns) == [2]


def heads(*stderrs, **options):
    place = {"stack": "decoder", "layer": 1, "site": "weights", "part": "self", "metric": "value_output_sign"}
    return [Row(**place, value=0.25 + h / 2, head=h, stderr=e, n=8) for h, e in enumerate(stderrs)]


def test_a_mean_over_heads_has_the_mean_of_their_errors_which_bounds_its_own():
    made = Variants.of([Report(Table(heads(0.1, 0.3)))] * 2, ["a", "b"])
    (line,) = made.figure("value_output_sign", view="lines").data
    assert list(line.y) == [0.5, 0.5]
    assert list(line.error_y.array) == [pytest.approx(0.2)] * 2


def test_a_number_of_all_heads_together_does_not_enter_the_mean_over_heads():
    together = replace(heads(0.1)[0], head=None, value=0.9)
    made = Variants.of([Report(Table([*heads(0.1, 0.3), together]))] * 2, ["a", "b"])
    assert made.pivot("value_output_sign").loc["a", 1] == 0.5


def test_the_colours_of_a_sheet_are_those_of_its_layout(variants):
    figure = variants.figure("token_energy", view="sheet")
    assert figure.data[0].coloraxis == "coloraxis"
    assert figure.data[0].colorbar.thickness is None
    assert figure.layout.coloraxis.colorbar.thickness == 10


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


def test_the_terminal_says_what_rows_and_numbers_say_and_how_many_notes_are_left(variants):
    values = {"all": 1.0, "no-first": 9.0}
    first = [Row("encoder", 1, "stream", "out", "stable_rank", value, scope=scope) for scope, value in values.items()]
    marked = replace(variants.reports[0], rows=Table([*variants.reports[0].rows, *first]))
    text = " ".join(shown(Variants.of([marked, variants.reports[1]], ["one", "two"])).split())
    assert f"span_novelty: {REASON}" in text
    assert "one: the first token of each sequence sets token metrics of encoder" in text
    assert "two: the first token" not in text
    many = Variants.of(variants.reports, LABELS, notes=[f"note {letter}." for letter in "abcdefghij"])
    text = " ".join(shown(many).split())
    assert "note h." in text and "note i." not in text
    assert "and 4 more, in the saved series and in the notes of each report" in text


def test_a_page_that_is_written_is_not_recommended(variants, capsys):
    variants.print()
    assert "--html" in capsys.readouterr().out
    variants.print(page_written=True)
    printed = capsys.readouterr().out
    assert "--html" not in printed and "--json" in printed


def test_variants_of_different_depth_stand_side_by_side():
    both = Variants.of([variant(0, layers=2), variant(1, layers=4)], ["two", "four"])
    frame = both.pivot("token_energy")
    assert list(frame.columns) == [0, 1, 2, 3, 4]
    assert frame.loc["two"].isna().sum() == 2
    assert both.figure("token_energy", view="lines").data[4].y[0] is None
