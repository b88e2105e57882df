"""What the terminal shows: what was examined, a line per layer, notes, the next step, within the width there is."""

import io

import pytest
from rich.console import Console

from fullrank.report import Report
from fullrank.report.terminal import bar
from fullrank.table import Row, Table
from report.synthetic import report


def shown(made, width=100, *, encoding="utf-8", terminal=False):
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="strict")
    Console(file=file, width=width, force_terminal=terminal).print(made)
    file.flush()
    return buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def encoder():
    return report(layers=6, heads=4, tokens=16, floor=4)


def test_it_says_what_was_examined_and_what_to_do_next(encoder):
    text = " ".join(shown(encoder).split())
    for words in (
        "a-small-encoder (BertModel, 22.7 M parameters)",
        "6 blocks, 4 heads, width 384, bidirectional",
        "8 sequences, 1003 tokens, context 16",
        "float32, cpu, kernels untouched, seed 0, 11.3 s",
        "Attention kernel: scaled_dot_product_attention",
        "span_novelty: as many tokens as features",
        "fullrank metrics",
        "--html",
    ):
        assert words in text


def test_every_layer_is_one_line_with_the_numbers_of_the_table(encoder):
    lines = {line.split()[0]: line for line in shown(encoder).splitlines() if line[:5].strip().isdigit()}
    assert sorted(map(int, lines)) == list(range(7))
    for layer in range(7):
        value = encoder.pivot("token_energy", site="stream").loc[layer, "out"]
        assert f"{value:.3f}" in lines[str(layer)]
    entropy = encoder.pivot("normalized_entropy").loc[3].mean()
    sink = encoder.pivot("sink_mass").loc[3].max()
    assert f"{entropy:.3f}" in lines["3"]
    assert f"{sink:.3f}" in lines["3"]


def test_values_made_of_rounding_are_marked_and_the_mark_explained(encoder):
    text = shown(encoder)
    assert [line.split()[0] for line in text.splitlines() if "⌊" in line] == ["4", "⌊"]
    assert "⌊" not in shown(report(layers=2, heads=2, tokens=8))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(encoder, width):
    text = shown(encoder, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count(f"{encoder.pivot('normalized_entropy').loc[6].mean():.3f}") >= 1


def test_bars_are_there_at_80_columns(encoder):
    assert sum("█" in line for line in shown(encoder, 80).splitlines()) >= 6


def test_no_colour_where_there_is_no_terminal(encoder):
    assert "\x1b" not in shown(encoder)
    assert "\x1b[" in shown(encoder, terminal=True)


def test_an_ascii_terminal_gets_ascii(encoder):
    shown(report(layers=2, heads=2, tokens=8, notes=()), encoding="ascii").encode("ascii")


def test_a_number_that_could_not_be_had_is_a_dash_and_what_was_not_asked_is_blank():
    rows = [
        Row("encoder", 0, "stream", "out", "similarity", 0.5),
        Row("encoder", 1, "stream", "out", "similarity", None, note="one token"),
        *(Row("encoder", 1, "attention", "self", "sink_mass", None, head=h, note="no query") for h in range(2)),
    ]
    lines = shown(Report(rows=Table(rows))).splitlines()
    assert next(line for line in lines if line.strip().startswith("1 ")).count("–") == 2
    assert "–" not in next(line for line in lines if line.strip().startswith("0 "))


def test_names_are_never_read_as_markup():
    assert "[bold]name[/bold] [red" in shown(report(layers=1, heads=1, tokens=4, model="[bold]name[/bold] [red"))


def test_a_second_attention_of_a_stack_has_its_own_table():
    rows = [
        Row("decoder", 1, "attention", part, "sink_mass", value, head=0)
        for part, value in (("self", 0.25), ("cross", 0.75))
    ]
    text = shown(Report(rows=Table(rows)))
    assert "decoder · cross attention" in text
    assert "0.750" in text


def test_an_empty_report_prints():
    assert "next" in shown(Report(rows=Table()))


def test_print_goes_to_standard_output(encoder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    encoder.print()
    printed = capsys.readouterr().out
    assert "a-small-encoder" in printed
    assert printed == shown(encoder, 80)


def test_a_page_that_is_written_is_not_recommended(encoder, capsys):
    encoder.print(page_written=True)
    printed = capsys.readouterr().out
    assert "--html" not in printed
    assert "--json" in printed


def test_an_overlay_prints_both_reports(encoder):
    text = shown(encoder.overlay(encoder, labels=("before", "after")))
    assert text.index("before") < text.index("after")


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, "    "), (1e-9, "▏   "), (0.5, "██  "), (0.53125, "██▏ "), (1, "████")]
)
def test_bars_are_drawn_in_eighths(share, drawn):
    assert bar(share, 4) == drawn


def test_causal_numbers_say_which_tokens_they_are_of():
    assert "late: the later half of the context" in shown(report(layers=2, heads=2, tokens=8, causal=True))


def test_a_long_path_is_folded_not_cut():
    name = "/somewhere/" + "very-long-directory/" * 8 + "model"
    assert name in "".join(shown(report(layers=1, heads=1, tokens=4, model=name), 80).replace(" ", "").split("\n"))
