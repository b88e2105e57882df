"""`--fail-on`: the exit code is 1 where a verdict is that grave, and never by default."""

import json

import pytest

from fullrank.report.verdict import Diagnosis, Severity, Verdict

SMALL = "arch:gpt2?n_layer={}&n_embd=8&n_head=2&n_positions=32&vocab_size=50&bos_token_id=49&eos_token_id=49"
ONE, TWO = SMALL.format(1), SMALL.format(2)
OPTIONS = ("--no-spectrum", "--no-reference", "--documents", "2", "--context", "16")


@pytest.fixture
def found(monkeypatch):
    """Every model of `n` blocks has the verdicts that are given for `n`: what is tested is what becomes of them."""

    def set_to(**by_blocks):
        def diagnosed(evidence, failures, **_):
            (stack,) = evidence.stacks.values()
            severities = by_blocks.get(f"blocks_{stack['blocks']}", ())
            return Diagnosis(
                tuple(Verdict("dead-depth", Severity(one), "A claim.", "decoder", command="next") for one in severities)
            )

        monkeypatch.setattr("fullrank.verbs.diagnosed.diagnose", diagnosed)

    return set_to


@pytest.mark.parametrize("severities", [(), ("note",), ("warn",), ("fail", "note")])
def test_by_default_no_verdict_changes_the_exit_code(fullrank, found, severities):
    found(blocks_1=severities)
    result = fullrank("examine", ONE, *OPTIONS)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("A claim.") == len(severities)


@pytest.mark.parametrize(
    ("limit", "severities", "code"),
    [
        ("warn", (), 0),
        ("warn", ("note",), 0),
        ("warn", ("warn",), 1),
        ("warn", ("fail",), 1),
        ("fail", ("warn", "note"), 0),
        ("fail", ("fail", "warn"), 1),
        ("note", ("note",), 1),
    ],
)
def test_a_verdict_at_or_above_it_gives_1_after_the_report(fullrank, found, here, limit, severities, code):
    found(blocks_1=severities)
    result = fullrank("examine", ONE, *OPTIONS, "--fail-on", limit, "--html", "page.html")
    assert result.exit_code == code
    assert (here / "page.html").exists()
    assert result.stdout.rstrip().endswith(f"The page: {here / 'page.html'}")
    said = f"fullrank: {severities[0]}: dead-depth, and --fail-on {limit} was given.\n" if code else ""
    assert result.stderr == said


def test_json_is_whole_beside_exit_code_1(fullrank, found):
    found(blocks_1=("fail",))
    result = fullrank("examine", ONE, *OPTIONS, "--fail-on", "fail", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["diagnosis"]["verdicts"][0]["severity"] == "fail"


def test_of_several_models_one_grave_verdict_is_enough(fullrank, found):
    found(blocks_1=("note",), blocks_2=("warn",))
    assert fullrank("examine", ONE, TWO, *OPTIONS, "--fail-on", "warn").exit_code == 1
    assert fullrank("examine", ONE, TWO, *OPTIONS, "--fail-on", "fail").exit_code == 0


def test_what_could_not_be_examined_is_2_whatever_the_verdicts(fullrank, found):
    found(blocks_1=("fail",))
    result = fullrank("examine", ONE, "./lost", *OPTIONS, "--fail-on", "warn")
    assert result.exit_code == 2
    assert "lost was not examined" in result.stderr
    assert fullrank("examine", "./lost", *OPTIONS, "--fail-on", "warn").exit_code == 2


def test_a_severity_that_there_is_none_of_is_refused(fullrank):
    result = fullrank("examine", ONE, "--fail-on", "dreadful")
    assert result.exit_code == 2
    assert "dreadful" in result.stderr
