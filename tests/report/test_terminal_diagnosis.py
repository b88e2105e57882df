"""The diagnosis on a terminal: verdicts first, layers beside their initialisation, then what is clear and what not."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fullrank.report import Report, Variants
from fullrank.report.terminal_diagnosis import effect_words, named_once
from fullrank.report.verdict import Checked, Diagnosis, Effect, Severity
from fullrank.table import Row, Table
from report.diagnosed import EFFECT, diagnosed, diagnosis, verdict


def shown(made, width=140, *, encoding="utf-8"):
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="strict")
    Console(file=file, width=width).print(made)
    file.flush()
    return buffer.getvalue().decode(encoding)


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def made():
    return diagnosed()


def test_verdicts_come_before_the_layers_and_what_was_checked_after_them(made):
    lines = [line.strip() for line in shown(made).splitlines()]
    places = [lines.index(title) for title in ("verdicts", "encoder", "checked and clear", "not checked", "next")]
    assert "a-small-encoder" in lines[0]
    assert places == sorted(places)


def test_every_verdict_is_shown_with_its_severity_claim_and_command_gravest_first(made):
    lines = shown(made).splitlines()
    heads = [line.split()[:2] for line in lines if line.split()[:1] and line.split()[0] in ("fail", "warn", "note")]
    assert heads == [["fail", "rank-collapse-depth"], ["warn", "dead-depth"], ["note", "sinks"]]
    text = words(shown(made))
    assert text.count("Block 4 of encoder changes the stream by 1.2 % (limit 5 %).") == 3
    assert "next: fullrank explain dead-depth" in text


def test_an_effect_is_one_line_with_interval_baseline_and_documents(made):
    said = "layer 4 skipped: 0.001 of loss on 3.21 (95 %: −4.0e−4 to 0.003; 8 documents)"
    assert effect_words(EFFECT) == said
    assert said in words(shown(made))
    state = Effect("layer 4 skipped", "state", 0.25, 0.2, 0.3, 5)
    assert (
        effect_words(state)
        == "layer 4 skipped: 0.250 of the final state's variance (95 %: 0.200 to 0.300; 5 documents)"
    )


@pytest.mark.parametrize(
    ("severity", "command", "outcome", "said"),
    [
        ("note", "fullrank examine SPEC --verify", "", True),
        ("note", "fullrank examine SPEC --gradients", "", False),  # no intervention tests it
        ("note", "fullrank explain sinks", "the change of the loss", False),
        ("warn", "fullrank examine SPEC --verify", "", False),  # it rests on its references
    ],
)
def test_what_a_test_would_add_is_said_only_where_one_would(severity, command, outcome, said):
    one = verdict("sinks", Severity(severity), effects=(), command=command)
    text = shown(Report(rows=Table(), diagnosis=Diagnosis((one,), outcome=outcome)))
    assert ("not tested: --verify would; next: " in text) is said
    assert f"next: {command}" in text


def test_without_verdicts_it_says_so_and_without_a_diagnosis_nothing():
    assert "none: nothing that was looked for was found." in shown(Report(rows=Table(), diagnosis=Diagnosis()))
    assert "verdicts" not in shown(Report(rows=Table())).replace("verdict means", "")


@pytest.mark.parametrize(
    ("weights", "because", "said"),
    [
        ("trained", "they were read from a checkpoint.", "trained weights: they were read from a checkpoint."),
        ("fresh", "", "fresh weights\n"),
        ("unknown", "nobody said.", "trained or fresh is not known: nobody said."),
    ],
)
def test_it_says_whether_weights_are_trained_and_how_that_is_known(weights, because, said):
    one = Diagnosis(weights=weights, because=because)
    assert said in re.sub(" +\n", "\n", shown(Report(rows=Table(), diagnosis=one)))


def test_references_and_tests_are_named(made):
    text = words(shown(made))
    assert "compared with: BertModel built anew from its configuration, seed 7919." in text
    assert "tested by: the change of the loss, of 8 documents" in text


def test_a_missing_reference_is_not_something_compared_with():
    one = Diagnosis(reference="no reference: none was asked for.")
    assert "\nno reference: none was asked for." in shown(Report(rows=Table(), diagnosis=one))


def test_what_is_clear_and_what_was_not_checked_are_listed_with_their_words(made):
    text = words(shown(made))
    clear, unchecked = text.index("checked and clear"), text.index("not checked")
    assert clear < text.index("numerics encoder: all pairs of tokens differ in float32.") < unchecked
    assert text.index("redundant-heads needs what heads write through W_O") > unchecked
    only = replace(made, diagnosis=diagnosis(clear=(), unchecked=()))
    assert not {"checked and clear", "not checked"} & set(shown(only).splitlines())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("encoder: one; encoder: two; encoder: three.", "encoder: one; two; three."),
        ("encoder: one; decoder: two; encoder: three.", "encoder: one; decoder: two; encoder: three."),
        ("none of 72 heads; encoder: two.", "none of 72 heads; encoder: two."),
        ("encoder: one; none; encoder: two.", "encoder: one; none; encoder: two."),
    ],
)
def test_a_stack_that_says_several_things_is_named_once(said, expected):
    assert named_once(said) == expected


# ---------------------------------------------------------------- a line per layer


def table(text, title="encoder"):
    """Heading words of each column, and cells by layer, of the first table below a title; bars left out."""
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.strip() == title)) + 1
    first = next(n for n in range(start, len(lines)) if lines[n].split()[:1] == ["layer"])
    cells = {}
    for line in lines[first + 1 :]:
        if not line[:5].strip().isdigit():
            break
        cells[int(line[:5])] = [cell for cell in line[5:].split() if not re.fullmatch("[▏▎▍▌▋▊▉█]+", cell)]
    return lines[start : first + 1], cells


def test_ratios_to_the_initialisation_stand_beside_their_numbers(made):
    _, cells = table(shown(made))
    for layer, line in cells.items():
        energy = made.pivot("token_energy", site="stream").loc[layer, "out"]
        assert line[0].rstrip("⌊") == f"{energy:.3f}"
        assert line[1] == "2.00×"
    gradients = table(shown(made), "encoder · gradients")[1]
    assert [line[-1] for line in gradients.values()] == ["2.00×"] * 7


def test_without_a_reference_there_is_no_such_column(made):
    assert "2.00×" not in shown(replace(made, reference=None))
    assert "init" not in " ".join(table(shown(replace(made, reference=None)))[0])


def test_the_kinds_of_each_layers_heads_are_counted(made):
    _, cells = table(shown(made))
    assert cells[0][-2:] != ["1p", "3m"]
    assert all(cells[layer][-2:] == ["1p", "3m"] for layer in range(1, 7))
    assert "heads: p points each query to keys of its own" in words(shown(made))
    assert "1p" not in shown(replace(made, diagnosis=diagnosis()))


def test_of_several_stacks_each_has_its_own_kinds_and_ratios():
    encoder, decoder = diagnosed(layers=2), diagnosed(layers=2, stack="decoder")
    slower = replace(decoder.reference, rows=Table(replace(row, value=row.value * 4) for row in decoder.reference.rows))
    both = replace(
        encoder,
        rows=Table([*encoder.rows, *decoder.rows]),
        reference=Report(rows=Table([*encoder.reference.rows, *slower.rows])),
        diagnosis=diagnosis(kinds=(("encoder", 1, 0, "pointer"), ("decoder", 1, 0, "sink"))),
    )
    text = shown(both)
    assert [line[1] for line in table(text)[1].values()] == ["2.00×"] * 3
    assert [line[1] for line in table(text, "decoder")[1].values()] == ["0.500×"] * 3
    assert table(text)[1][1][-1] == "1p"
    assert table(text, "decoder")[1][1][-1] == "1s"


def test_a_second_attention_has_no_kinds_of_the_first():
    rows = [
        Row("decoder", 1, "attention", part, "normalized_entropy", value, head=0, n=8)
        for part, value in (("self", 0.25), ("cross", 0.75))
    ]
    made = Report(rows=Table(rows), diagnosis=Diagnosis(kinds=(("decoder", 1, 0, "pointer"),)))
    assert table(shown(made), "decoder")[1][1] == ["0.250", "1p"]
    assert table(shown(made), "decoder · cross attention")[1][1] == ["0.750"]


# ---------------------------------------------------------------- widths


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_no_line_is_wider_than_the_terminal(made, width):
    text = shown(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert words(text).count("2.00×") == 7 + 6 + 7  # energies, updates, gradients


def test_at_80_columns_the_numbers_still_have_bars_and_a_ratio_stands_in_the_table_of_its_number(made):
    lines = shown(made, 80).splitlines()
    assert sum("█" in line for line in lines) >= 12  # both parts of the table
    for line in lines:
        if line.split()[:2] == ["layer", "×"] or line.split()[:2] == ["layer", "init"]:
            raise AssertionError(f"a table opens with a ratio: {line}")


@pytest.mark.parametrize("width", range(80, 141, 4))
def test_the_share_of_a_token_has_its_bar_at_every_width(made, width):
    lines = shown(made, width).splitlines()
    start = lines.index(next(line for line in lines if line.strip() == "encoder"))
    layers = [line for line in lines[start:] if line[:5].strip().isdigit()][:7]
    assert all(re.search("[▏▎▍▌▋▊▉█]", line) for line in layers)
    assert max(map(len, lines)) <= width


def test_an_ascii_terminal_gets_ascii():
    made = diagnosed()
    made = replace(made, about=dict(made.about) | {"notes": []}, diagnosis=replace(made.diagnosis, kinds=()))
    kept = [row for row in made.rows if row.metric in ("token_energy", "update_share")]
    text = shown(replace(made, rows=Table(kept)), encoding="ascii")
    assert "2.00x" in text
    assert "layer 4 skipped: 0.001 of loss on 3.21 (95 %: -4.0e-4 to 0.003; 8 documents)" in words(text)
    assert "0.9 of the stream's size - or more" in words(text)


def test_words_of_a_diagnosis_are_never_read_as_markup():
    one = verdict("sinks", claim="[bold]claim[/bold] [red", effects=(), command="fullrank examine '[red' --verify")
    made = Report(rows=Table(), diagnosis=Diagnosis((one,), clear=(Checked("numerics", "[blue]clear"),)))
    text = shown(made)
    assert "[bold]claim[/bold] [red" in text
    assert "fullrank examine '[red' --verify" in text
    assert "[blue]clear" in text


def test_variants_have_a_count_of_their_verdicts(made):
    text = shown(
        Variants.of([made, Report(rows=made.rows, diagnosis=Diagnosis()), Report(rows=made.rows)], ["a", "b", "c"])
    )
    lines = {line.split()[0]: line.rstrip() for line in text.splitlines()[:6] if line.split()}
    assert lines["a"].endswith("1 fail, 1 warn, 1 note")
    assert lines["b"].endswith("none")
    assert not lines["c"].endswith("none")
