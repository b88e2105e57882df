"""Numbers against the context: every point is a row, every cell a slope, and the words say what the numbers say."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from fullrank.errors import TableError
from fullrank.report import Report
from fullrank.report.context import context_figures
from fullrank.report.series import series_of
from fullrank.report.steepness import slope_figure
from fullrank.report.trends import counted, interval, steepest
from fullrank.report.wording import scope_words
from fullrank.table import Row, Slope, Table, context_of, headline, in_context
from report.synthetic import with_contexts

CONTEXTS = (64, 256, 1024)


@pytest.fixture(scope="module")
def made():
    return with_contexts(layers=4, heads=3, contexts=CONTEXTS)


def lines(figure):
    return [one for one in figure.data if one.mode == "lines+markers"]


def test_a_line_per_layer_goes_through_the_rows(made):
    figure = made.context_figure("similarity")
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == list(CONTEXTS)
    assert [line.name for line in lines(figure)] == [f"layer {layer}" for layer in range(5)]
    for layer, line in enumerate(lines(figure)):
        assert list(line.x) == list(CONTEXTS)
        where = {"metric": "similarity", "layer": layer, "site": "stream", "part": "out"}
        rows = [made.rows.where(scope=f"late+context={c}", **where).rows[0] for c in CONTEXTS]
        assert list(line.y) == [pytest.approx(row.value, rel=1e-5) for row in rows]
        assert f"± {rows[0].stderr:.3f}" in line.customdata[0][2]


def test_bands_are_one_standard_error_wide(made):
    figure = made.context_figure("similarity")
    bands = [one for one in figure.data if one.fill == "toself"]
    assert len(bands) == len(lines(figure))
    for band, line in zip(bands, lines(figure), strict=True):
        upper, lower = band.y[: len(CONTEXTS)], band.y[len(CONTEXTS) :][::-1]
        assert [(a + b) / 2 for a, b in zip(upper, lower, strict=True)] == [pytest.approx(y, rel=1e-4) for y in line.y]
        rows = [r for r in made.rows.where(metric="similarity", layer=bands.index(band)) if context_of(r.scope)]
        assert [(a - b) / 2 for a, b in zip(upper, lower, strict=True)] == [
            pytest.approx(r.stderr, abs=1e-5) for r in rows
        ]


def test_of_heads_the_line_is_their_mean(made):
    figure = made.context_figure("entropy")
    first = [made.rows.where(metric="entropy", layer=1, scope=f"late+context={c}") for c in CONTEXTS]
    expected = [sum(row.value for row in rows) / len(rows) for rows in first]
    assert list(lines(figure)[0].y) == [pytest.approx(value, rel=1e-5) for value in expected]
    assert "mean over heads" in figure.layout.yaxis.title.text


def test_of_heads_the_band_is_what_the_error_of_their_mean_cannot_exceed():
    place = ("decoder", 1, "attention", "self", "entropy")
    rows = [
        Row(*place, 1.0, head=head, stderr=stderr, n=8, scope=in_context("late", context))
        for head, stderr in enumerate((0.1, 0.3))
        for context in CONTEXTS
    ]
    (band,) = [one for one in Report(Table(rows)).context_figure("entropy").data if one.fill == "toself"]
    assert band.y[0] == pytest.approx(1.2)  # the mean of the two, reached where the heads move as one


def test_what_was_not_taken_at_several_contexts_is_refused_by_name(made):
    with pytest.raises(
        TableError, match="metric='rms' was not taken at several contexts in this report; it has entropy"
    ):
        made.context_figure("rms")
    with pytest.raises(TableError, match="pass contexts= to examine"):
        Report(rows=Table()).context_figure("entropy")
    with pytest.raises(TableError, match=r"scopes: .'late'."):
        made.context_figure("entropy", scope="all")
    with pytest.raises(TableError, match="needs one place"):
        made.context_figure("similarity", stack="encoder")


def test_a_number_that_is_missing_at_every_context_has_no_figure_and_takes_no_page_with_it(made, tmp_path):
    missing = [
        Row("decoder", 4, "stream", "out", "token_loss", None, scope=f"late+context={c}", note="no labels")
        for c in CONTEXTS
    ]
    slope = Slope("decoder", 4, "stream", "out", "token_loss", None, "late", CONTEXTS, 0, *([None] * 8), "no labels")
    report = replace(made, rows=Table([*made.rows, *missing]), context_slopes=(*made.context_slopes, slope))
    drawn = {one["metric"] for one in context_figures(series_of((report,), ("",)))}
    assert drawn
    assert drawn == {one["metric"] for one in context_figures(series_of((made,), ("",)))}
    assert "no labels" in report.save_html(tmp_path / "page.html").read_text(encoding="utf-8")


def test_rows_of_one_context_never_come_before_those_of_the_whole(made):
    assert headline({"late", "late+context=64", "all"}) == "late"
    assert headline({"all+context=64", "all"}) == "all"
    assert headline({"late+no-sink", "late+context=64"}) == "late+no-sink"
    assert made.pivot("entropy").equals(made.pivot("entropy", scope="late"))
    assert {trace.name for trace in made.figure("similarity").data}
    assert "context=" not in str(made.figure("entropy").to_dict())


def test_slopes_are_a_frame_with_missing_ends_where_there_is_no_interval(made):
    frame = made.slopes
    assert list(frame.columns) == [
        *("stack", "layer", "site", "part", "head", "scope", "metric", "contexts", "n"),
        *("per_doubling", "stderr", "low", "high"),
        *("exponent", "exponent_stderr", "exponent_low", "exponent_high"),
    ]
    assert len(frame) == len(made.context_slopes)
    alone = frame[frame.metric == "token_energy"]
    assert alone.stderr.isna().all()
    assert alone.per_doubling.notna().all()
    assert set(frame.contexts) == {CONTEXTS}


def test_json_keeps_slopes_exactly_and_documents_without_them_load(made):
    assert Report.from_json(made.to_json()) == made
    old = json.loads(made.to_json())
    del old["slopes"]
    assert Report.from_json(json.dumps(old)) == Report(rows=made.rows, about=made.about, spectra=made.spectra)
    assert "slopes" not in json.loads(Report(rows=made.rows).to_json())
    old["slopes"] = [{"stack": "decoder"}]
    with pytest.raises(TableError, match=r"a slope has \['stack'\]; expected stack, layer"):
        Report.from_json(json.dumps(old))


def slope(metric="entropy", layer=3, head=5, change=-0.12, half=0.02, **options):
    ends = {"low": change - half, "high": change + half} if half is not None else {}
    where = {"stack": "decoder", "layer": layer, "site": "attention", "part": "self", "scope": "late"} | options
    return Slope(metric=metric, head=head, contexts=CONTEXTS, n=8, per_doubling=change, **ends, **where)


def sized(*slopes, value=1.0):
    return [
        Row(s.stack, s.layer, s.site, s.part, s.metric, value, head=s.head, scope=f"{s.scope}+context=64")
        for s in slopes
    ]


def test_the_steepest_say_where_how_much_and_how_sure():
    falls = slope()
    (trend,) = steepest([falls], sized(falls))
    assert trend.where == "decoder layer 3 head 5"
    assert trend.said == "falls by 0.120 nats per doubling, 95 % interval −0.140 to −0.100"
    rises = slope("similarity", head=None, change=0.5, site="stream", part="mid", exponent=0.25)
    (trend,) = steepest([rises], sized(rises))
    assert trend.where == "decoder layer 3, between attention and MLP"
    assert trend.said == "rises by 0.500 per doubling, 95 % interval 0.480 to 0.520; like context^0.25"


def test_what_chance_explains_is_not_steep_and_one_metric_does_not_fill_the_list():
    flat = [slope(change=0.01, half=0.02), slope(change=9.0, half=None), slope("numerical_rank", change=9.0)]
    assert steepest(flat, sized(*flat)) == []
    many = [slope(head=head, change=-0.1 * (head + 1), half=0.01) for head in range(6)]
    found = steepest(many, sized(*many))
    assert [trend.slope.head for trend in found] == [5, 4]
    assert [trend.slope.head for trend in steepest(many, sized(*many), each=6, most=3)] == [5, 4, 3]


def test_steep_is_a_share_of_the_numbers_own_size():
    small, large = slope("sink_mass", change=0.1), slope("entropy", change=0.3, half=0.01)
    rows = [*sized(small, value=0.2), *sized(large, value=6.0)]
    assert [trend.slope.metric for trend in steepest([large, small], rows)] == ["sink_mass", "entropy"]


def test_cells_of_slopes_drop_a_leading_zero_and_no_other():
    changes = (10.4, -10.4, 0.4, -0.4, 20.05, 0.999)
    figure = slope_figure([slope(head=head, change=c, half=0.01) for head, c in enumerate(changes)], "effective_keys")
    assert figure["data"][0]["text"] == [["+10.40", "−10.40", "+.40", "−.40", "+20.05", "+1.00"]]


def test_the_context_of_a_scope_is_said_in_words():
    assert scope_words("late+context=64") == "the later half of the context; sequences of 64 tokens"


def test_how_many_would_be_clear_by_chance_is_said():
    some = [slope(head=h, change=0.0 if h else 1.0) for h in range(40)]
    assert counted(some) == "1 of 40 intervals leave out 0; about 2 would if nothing changed."
    assert counted([slope(half=None)]) == "No intervals: they need at least two sequences."
    assert interval(slope(half=None, note="why not")) == "why not"


def test_the_terminal_says_the_steepest_in_a_few_lines(made):
    console = Console(file=io.StringIO(), width=110)
    console.print(made)
    text = console.file.getvalue()
    assert "by context (64, 256, 1024 tokens)" in text
    assert "per doubling, 95 % interval" in text
    assert "intervals leave out 0" in text
    plain = Console(file=io.StringIO(), width=110)
    plain.print(Report(rows=Table(r for r in made.rows if "context=" not in r.scope), about=made.about))
    assert "by context" not in plain.file.getvalue()


def test_a_name_with_markup_is_shown_and_not_run():
    evil = "<script>alert(1)</script>"
    bad = slope(evil)
    page = Report(rows=Table(sized(bad)), context_slopes=(bad,)).to_html()
    assert evil not in page
    assert math.isclose(bad.per_doubling, -0.12)
