"""Every figure draws the numbers of the table, at their layer and head, and nothing else."""

import math

import numpy as np
import pytest

from fullrank.errors import TableError
from fullrank.report import HeadSpectrum, Report
from fullrank.table import Row, Table
from report.synthetic import FLOOR, REASON, report


@pytest.fixture(scope="module")
def encoder():
    return report(layers=6, heads=4, tokens=16, floor=4)


@pytest.fixture(scope="module")
def decoder():
    return report(layers=3, heads=2, tokens=16, causal=True, seed=1)


def trace(figure, name):
    return next(one for one in figure.data if one.name == name)


def test_a_profile_draws_the_pivot(encoder):
    pivot = encoder.pivot("similarity", site="stream")
    figure = encoder.figure("similarity")
    drawn = trace(figure, "block output")
    assert list(drawn.x) == list(pivot.index)
    assert np.allclose(drawn.y, pivot["out"].astype(float), rtol=1e-5)
    assert figure.layout.yaxis.title.text == "similarity"
    assert figure.layout.xaxis.title.text == "layer"


def test_a_profile_has_error_bars_of_one_standard_error(encoder):
    drawn = trace(encoder.figure("similarity", site="stream", part="out"), "block output")
    stderr = [row.stderr for row in encoder.rows.where(metric="similarity", site="stream", part="out")]
    assert np.allclose(drawn.error_y.array, stderr, rtol=1e-5)


def test_the_state_between_attention_and_mlp_stands_half_a_layer_before_its_block_output(encoder):
    assert list(trace(encoder.figure("rms"), "between attention and MLP").x) == [n - 0.5 for n in range(1, 7)]


def test_places_differ_in_more_than_colour(encoder):
    traces = encoder.figure("rms").data
    assert len({(one.line.dash, one.marker.symbol[0]) for one in traces}) >= 3
    assert len({one.line.color for one in traces}) == len(traces) == 4


def test_layers_have_integer_ticks_few_enough_to_read():
    for layers in (1, 6, 12, 48, 96):
        axis = report(layers=layers, heads=1, tokens=4, spectra=False).figure("rms").layout.xaxis
        assert axis.dtick == int(axis.dtick) >= 1
        assert layers / axis.dtick <= 13


def test_the_null_is_a_labelled_line_where_the_report_knows_it(encoder):
    figure = encoder.figure("residual")
    assert [shape.y0 for shape in figure.layout.shapes] == [0.996]
    assert "random tokens: 0.996" in figure.layout.annotations[0].text
    assert not encoder.figure("rms").layout.shapes


def test_a_logarithmic_profile_puts_the_null_label_at_its_exponent(encoder):
    figure = encoder.figure("centered_stable_rank", logarithmic=True)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.annotations[0].y == pytest.approx(math.log10(47.1))
    assert not encoder.figure("similarity", logarithmic=True).layout.shapes  # its null is 0


def test_missing_values_are_gaps_with_their_reason(encoder):
    figure = encoder.figure("span_novelty")
    assert figure.data[0].y[0] is None
    assert figure.layout.meta["missing"] == [f"layer 1, 2 · block output: {REASON}"]


def test_values_at_the_float_floor_have_their_own_mark(encoder):
    symbols = trace(encoder.figure("residual"), "block output").marker.symbol
    assert [layer for layer, symbol in enumerate(symbols) if symbol == "triangle-down"] == [4]
    said = trace(encoder.figure("residual"), "block output").customdata[4][2]
    assert FLOOR in said.replace("<br>", " ")


def test_a_heat_map_draws_the_pivot_and_says_numbers_errors_and_definition(encoder):
    pivot = encoder.pivot("normalized_entropy")
    drawn = encoder.figure("normalized_entropy").data[0]
    assert list(drawn.y) == list(pivot.index)
    assert list(drawn.x) == list(pivot.columns)
    assert np.allclose(np.array(drawn.z, dtype=float), pivot.to_numpy(dtype=float), rtol=1e-5)
    assert drawn.customdata[2][1][1] == "± 0.010 · n = 8"
    assert "Mean over queries" in drawn.hovertemplate


def test_a_head_without_a_number_is_marked_and_its_reason_said(encoder):
    figure = encoder.figure("attention_s2")
    assert figure.data[0].z[4][3] is None
    assert figure.data[0].customdata[4][3][1].endswith("did not converge")
    assert (list(figure.data[1].x), list(figure.data[1].y), list(figure.data[1].text)) == ([3], [5], ["–"])


def test_the_headline_scope_is_drawn_unless_another_is_asked_for(decoder):
    late = decoder.pivot("sink_mass", scope="late")
    assert np.allclose(np.array(decoder.figure("sink_mass").data[0].z, float), late.to_numpy(float), rtol=1e-5)
    assert decoder.figure("sink_mass", scope="late+no-sink").data[0].z is not None


@pytest.mark.parametrize(
    ("metric", "place", "says"),
    [
        ("nonsense", {}, "metric='nonsense' is not in this report; it has"),
        ("similarity", {"scope": "late"}, "no rows of 'similarity' with scope='late'; there are"),
        ("entropy", {"stack": "decoder"}, "no rows of 'entropy' with stack='decoder'"),
    ],
)
def test_what_is_not_there_is_one_sentence_that_says_what_is(encoder, metric, place, says):
    with pytest.raises(TableError, match=says):
        encoder.figure(metric, **place)


def test_several_stacks_are_panels_of_one_figure(encoder, decoder):
    both = Report(rows=encoder.rows.merge(decoder.rows), about=encoder.about)
    figure = both.figure("rms", part="out", site="stream", scope="all")
    assert [one.xaxis for one in figure.data] == ["x", "x2"]
    assert {note.text for note in figure.layout.annotations} == {"encoder", "decoder"}
    assert len(both.figure("entropy", scope="all").data) == 2


def test_infinities_are_shown_as_such():
    rows = [Row("encoder", 1, "attention", "self", "max_logit", math.inf, head=h) for h in range(2)]
    figure = Report(rows=Table(rows)).figure("max_logit")
    assert list(figure.data[1].text) == ["∞", "∞"]


def test_a_name_is_never_markup_in_a_figure():
    named = report(layers=2, heads=2, tokens=8, model="<b>%{x}</b>", stack="<i>s</i>")
    other = report(layers=2, heads=2, tokens=8, seed=1, stack="<i>s</i>")
    for metric in ("rms", "entropy"):
        text = named.overlay(other).figure(metric).to_json()
        assert "<b>%{x}" not in text.replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<i>s" not in text.replace("\\u003c", "<").replace("\\u003e", ">")


# ---------------------------------------------------------------- scree


def test_the_scree_draws_every_value_at_its_rank_fraction(encoder):
    figure = encoder.scree(2, 1)
    spectrum = next(one for one in encoder.spectra if one.key == ("encoder", 2, "self", 1))
    drawn = trace(figure, "measured")
    assert np.allclose(drawn.y, spectrum.values, rtol=1e-5)
    assert np.allclose(drawn.x, [(rank + 0.5) / 16 for rank in range(16)])
    assert np.allclose(trace(figure, "permuted rows").y, spectrum.null, rtol=1e-5)


def test_the_scree_draws_the_bulk_up_to_its_edge(encoder):
    spectrum = encoder.spectra[0]
    bulk = next(one for one in encoder.scree(1, 0).data if one.name.startswith("random bulk"))
    assert spectrum.edge * 0.95 < max(bulk.y) < spectrum.edge
    assert min(bulk.x) > 1 / 16  # it begins after the first, uniform direction


def test_the_bulk_of_a_causal_map_is_said_to_assume_visible_keys(decoder):
    names = [one.name for one in decoder.scree(1, 0).data]
    assert any(name.endswith("(were all keys visible)") for name in names)


def test_leading_values_alone_are_drawn_close_up():
    spectrum = HeadSpectrum("decoder", 1, "self", 0, (1.1, 0.5), 4096, False, None, 0.01)
    figure = Report(rows=Table(), spectra=(spectrum,)).scree(1, 0, logarithmic=True)
    assert figure.layout.xaxis.range[1] < 0.05
    assert figure.layout.yaxis.type == "log"
    assert "leading 2 of 4096" in figure.layout.title.text


def test_long_spectra_are_thinned_evenly_and_keep_both_ends():
    values = tuple(1 / (1 + rank) for rank in range(1000))
    drawn = (
        Report(rows=Table(), spectra=(HeadSpectrum("e", 1, "self", 0, values, 1000, True, None, 0.1),))
        .scree(1, 0)
        .data[-1]
    )
    assert len(drawn.x) <= 160
    assert drawn.y[0] == 1
    assert drawn.y[-1] == pytest.approx(1e-3)


def test_a_spectrum_that_was_not_kept_is_one_sentence(encoder):
    with pytest.raises(TableError, match=r"no spectrum of layer=9, head=0 was kept; there are \(layer.head\): 1.0"):
        encoder.scree(9, 0)


# ---------------------------------------------------------------- overlays


def test_an_overlay_draws_both_reports_in_their_own_colours(encoder):
    other = report(layers=6, heads=4, tokens=16, seed=3, model="another")
    figure = encoder.overlay(other).figure("similarity")
    mine, theirs = trace(figure, "a-small-encoder · block output"), trace(figure, "another · block output")
    assert np.allclose(mine.y, encoder.pivot("similarity", site="stream")["out"].astype(float), rtol=1e-5)
    assert np.allclose(theirs.y, other.pivot("similarity", site="stream")["out"].astype(float), rtol=1e-5)
    assert mine.line.color != theirs.line.color


def test_heads_of_an_overlay_stand_side_by_side_with_their_difference(encoder):
    other = report(layers=6, heads=4, tokens=16, seed=3, model="another")
    figure = encoder.overlay(other, labels=("before", "after")).figure("entropy")
    difference = np.array(figure.data[-1].z, float)
    expected = other.pivot("entropy").to_numpy(float) - encoder.pivot("entropy").to_numpy(float)
    assert np.allclose(difference, expected, atol=1e-4)
    assert [note.text for note in figure.layout.annotations] == ["before", "after", "after minus before"]
    assert figure.data[-1].zmin == -figure.data[-1].zmax


def test_measured_and_theory_overlay_in_the_same_way(encoder):
    theory = Report(rows=encoder.rows.with_source("theory:noci"), about=encoder.about)
    overlay = encoder.overlay(theory)
    assert overlay.labels == ("measured", "theory:noci")
    assert len(overlay.figure("rms", site="stream", part="out").data) == 2


def test_sources_within_one_report_are_drawn_as_series_too(encoder):
    both = Report(rows=Table([*encoder.rows, *encoder.rows.with_source("initialisation")]), about=encoder.about)
    names = {one.name for one in both.figure("rms", site="stream", part="out").data}
    assert names == {"measured · block output", "initialisation · block output"}


def test_a_metric_that_only_one_report_has_is_drawn_alone(encoder):
    few = Report(rows=encoder.rows.where(metric="rms"), about={"model": "few"})
    assert len(few.overlay(encoder).figure("entropy").data) == 1


@pytest.mark.parametrize("labels", [("same", "same"), ("one",), ("", "two")])
def test_labels_must_tell_the_reports_apart(encoder, labels):
    with pytest.raises(TableError, match="must be 2 different names"):
        encoder.overlay(encoder, labels=labels)


def test_the_same_model_twice_gets_numbers(encoder):
    assert encoder.overlay(encoder).labels == ("a-small-encoder (1)", "a-small-encoder (2)")


def test_every_stack_is_drawn_at_its_own_headline_scope(encoder, decoder):
    both = Report(rows=encoder.rows.merge(decoder.rows))
    figure = both.figure("rms", site="stream", part="out")
    assert list(figure.data[0].y) == pytest.approx(
        [row.value for row in encoder.rows.where(metric="rms", site="stream", part="out")], rel=1e-5
    )
    assert list(figure.data[1].y) == pytest.approx(
        [row.value for row in decoder.rows.where(metric="rms", site="stream", part="out", scope="late")], rel=1e-5
    )
    assert {note.text for note in figure.layout.annotations} == {"encoder", "decoder, late"}
    assert [note.text for note in both.figure("entropy").layout.annotations] == [
        "encoder · self",
        "decoder · self, late",
    ]


def test_an_axis_names_unit_and_scope(decoder):
    assert decoder.figure("stable_rank").layout.yaxis.title.text == "stable rank (directions), late"


def test_cells_hold_two_decimals_and_exponents_only_where_the_whole_map_is_small():
    def texts(*values):
        rows = [Row("e", 1, "attention", "self", "entropy", value, head=h) for h, value in enumerate(values)]
        return list(Report(rows=Table(rows)).figure("entropy").data[0].text[0])

    assert texts(0.5, 0.0008, 12.3, -0.25) == [".50", "0", "12.3", "−.25"]
    assert texts(2e-5, 1e-5) == ["2.0e−5", "1.0e−5"]


def test_long_names_leave_the_captions_of_their_neighbours_free(encoder):
    names = ("first-" + "x" * 80, "second-" + "y" * 80)
    captions = [note.text for note in encoder.overlay(encoder, labels=names).figure("entropy").layout.annotations]
    assert max(map(len, captions)) <= 40
    assert captions[0].startswith("first-x") and captions[2] == "the second minus the first"
