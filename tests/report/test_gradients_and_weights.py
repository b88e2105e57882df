"""Gradients and weights in a report: tables of their own, tensors called alike as one line over depth."""

from __future__ import annotations

from fullrank.report import Report
from fullrank.report.headlines import headlines
from fullrank.report.wording import row_notes
from fullrank.table import Row, Table


def rows():
    found = []
    for layer in range(3):
        found.append(Row("decoder", layer, "gradient", "out", "gradient_gain", 2.0 - layer / 2, scope="late"))
        found.append(Row("decoder", layer, "gradient", "out", "gradient_gain", 9.0, scope="all"))
        if not layer:
            continue
        found.append(Row("decoder", layer, "gradient", "self", "query_key_to_value_output", 0.1 * layer))
        found.append(Row("decoder", layer, "gradient", f"h.{layer - 1}.c_proj.weight", "gradient_norm", float(layer)))
        for position, role in enumerate(("q", "k", "up")):
            found.append(Row("decoder", layer, "weights", role, "condensation", 0.1 + layer + position))
            found.append(Row("decoder", layer, "weights", role, "weight_stable_rank", 5.0 + layer + position))
        found.append(Row("decoder", layer, "attention", "self", "entropy", 1.0, head=0))
        found += [Row("decoder", layer, "weights", "self", "value_output_sign", 0.5 * h, head=h) for h in range(2)]
        found.append(Row("decoder", layer, "weights", "self", "value_output_sign", 0.9))
    found.append(Row("decoder", 0, "weights", "embed", "condensation", 99.0))
    return found


def test_gradients_have_a_table_over_the_headline_scope():
    table = next(table for table in headlines(rows()) if table.title == "decoder · gradients")
    assert [column.metric for column in table.columns] == ["gradient_gain", "query_key_to_value_output"]
    assert table.columns[0].scope == "late"
    assert [cells[0].text for _, cells in table.lines] == ["2.00", "1.50", "1.00"]
    assert [cells[1].text for _, cells in table.lines] == ["", "0.100", "0.200"]


def test_weights_are_summed_up_by_the_most_extreme_of_a_layer_and_embeddings_are_left_out():
    table = next(table for table in headlines(rows()) if table.title == "decoder · weights")
    lines = dict(table.lines)
    assert list(lines) == [1, 2]
    by_metric = {column.metric: index for index, column in enumerate(table.columns)}
    largest = lines[1][by_metric["condensation"]]
    smallest = lines[1][by_metric["weight_stable_rank"]]
    assert (largest.text, largest.said) == ("3.10", "up")
    assert (smallest.text, smallest.said) == ("6.00", "q")
    assert lines[1][by_metric["value_output_sign"]].text == "0.250"  # of the heads, not of all heads together
    captions = {column.metric: column.caption for column in table.columns}
    assert captions["condensation"] == "largest weight"
    assert captions["weight_stable_rank"] == "smallest weight"
    assert captions["value_output_sign"] == "mean over heads"


def test_tensors_called_alike_in_every_layer_are_one_line():
    figure = Report(Table(rows())).figure("gradient_norm")
    names = [trace.name for trace in figure.data]
    assert names == ["h.*.c_proj.weight"]
    assert list(figure.data[0].x) == [1, 2]
    assert list(figure.data[0].y) == [1.0, 2.0]


def test_notes_that_differ_in_numbers_alone_are_said_once_and_after_those_of_missing_values():
    noted = [
        Row("decoder", n, "attention", "self", "head_ambiguity", 1.0, note=f"condition number {n}.{n}e-2")
        for n in (1, 2)
    ]
    missing = Row("decoder", 1, "stream", "out", "span_novelty", None, note="not enough tokens")
    assert row_notes(Table([*noted, missing])) == [
        ("not enough tokens", "span_novelty"),
        ("condition number 1.1e-2 (and 1 more like it)", "head_ambiguity"),
    ]
