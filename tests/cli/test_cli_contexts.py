"""`--contexts` and `--heads` on a tiny checkpoint."""

import pytest

from fullrank.report import Report
from fullrank.report.trends import contexts_of

VIT = "arch:vit?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&image_size=32&patch_size=8"


def test_contexts_and_heads_are_those_of_python(fullrank, checkpoint):
    from fullrank.spec import inputs, load
    from fullrank.verbs.examine import examine

    result = fullrank("examine", checkpoint, "--contexts", "12,24", "--heads", "1.1", "--documents", "3", "--json")
    assert result.exit_code == 0, result.stderr
    given = Report.from_json(result.stdout)
    subject = load(str(checkpoint))
    expected = examine(subject, inputs(subject, context=24, documents=3), contexts=[12, 24], heads=["1.1"])
    assert given.rows == expected.rows
    assert given.context_slopes == expected.context_slopes
    assert contexts_of(given.rows) == [12, 24]
    assert given.about["input"]["tokens"] == 3 * 24
    assert {(one.layer, one.head) for one in given.spectra} == {(1, 1)}


def test_the_terminal_says_what_changes_with_the_context(fullrank, checkpoint, here):
    result = fullrank("examine", checkpoint, "--contexts", "12, 24", "--no-spectrum", "--html", "page.html")
    assert result.exit_code == 0, result.stderr
    assert "by context (12, 24 tokens)" in result.stdout
    assert 'id="tab-contexts"' in (here / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--contexts", "24"), "two or more whole numbers"),
        (("--contexts", "24,12"), "each larger"),
        (("--contexts", "12,many"), "--contexts '12,many' are no lengths"),
        (("--contexts", "12,5000"), "learned positions"),
        (("--contexts", "12,24", "--context", "16"), "asks for 24 tokens; the longest sequence of the batch has 16"),
        (("--heads", "x"), "heads='x' is no head"),
        (("--heads", "9.0"), "is in no stack of this model"),
        (("--heads", "1.0", "--no-spectrum"), "leaves out"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_code_two(fullrank, checkpoint, arguments, said):
    result = fullrank("examine", checkpoint, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_images_have_no_contexts(fullrank):
    result = fullrank("examine", VIT, "--contexts", "8,16")
    assert result.exit_code == 2
    assert "contexts= was given, but" in result.stderr
    assert "reads vision input" in result.stderr
