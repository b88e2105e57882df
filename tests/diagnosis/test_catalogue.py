"""What every failure has in common: names, texts, commands that run, thresholds that are used, works that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from fullrank.cli.app import app
from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.catalogue import FAILURES, failure_of
from fullrank.diagnosis.diagnose import diagnose
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.errors import DiagnosisError
from fullrank.report.verdict import Severity

ROOM = Path(__file__).parent.parent.parent / "src" / "fullrank" / "diagnosis"
SHARED = {"effect", "freshness", "kinds", "sure"}  # what several failures compare with
WORKS = {
    *("cowsik", "deepscalelm", "dong", "entropy", "giorlandino_goldt", "gradient_heterogeneity", "head_channel"),
    *("log_context", "mind_the_gap", "noci", "oversmoothing_fixes", "residual_scaling", "token_geometry"),
    *("wu_masks_layernorm",),
}
"""Keys under which this project knows a work."""

each = pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)


def test_names_are_different_and_written_with_dashes():
    names = [failure.name for failure in FAILURES]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z]+(-[a-z]+)*", name)] == []


def test_every_file_that_defines_a_failure_is_in_the_catalogue():
    defining = [path.stem for path in ROOM.glob("*.py") if "\nFAILURE = Failure(" in path.read_text(encoding="utf-8")]
    assert len(defining) == len(FAILURES)


@each
def test_a_failure_is_found_by_its_name(failure):
    assert failure_of(failure.name) is failure


def test_an_unknown_name_is_refused_in_one_sentence_with_a_close_one():
    with pytest.raises(DiagnosisError, match=r"^'sink' is no verdict \(did you mean 'sinks'\?\); there are .+\.$"):
        failure_of("sink")


@each
@pytest.mark.parametrize("text", ["means", "harmless", "tested", "refuted_by"])
def test_every_text_is_of_whole_sentences(failure, text):
    words = getattr(failure, text)
    assert words.endswith(".")
    assert words[0].isupper()
    assert "  " not in words
    assert "{" not in words


@each
def test_a_title_is_a_few_words_that_begin_with_a_capital_and_are_no_sentence(failure):
    assert failure.title[0].isupper()
    assert not failure.title.endswith(".")
    assert len(failure.title.split()) <= 9
    assert failure.title != failure.name.replace("-", " ").capitalize()  # it says more than the name


@each
def test_its_works_are_known_and_can_be_found(failure):
    assert failure.papers
    for paper in failure.papers:
        key, colon, title = paper.partition(": ")
        assert key in WORKS
        assert colon
        assert re.fullmatch(r"\S.* \(arXiv \d{4}\.\d{5}\)", title)


def test_every_known_work_is_some_failures():
    assert {paper.partition(":")[0] for failure in FAILURES for paper in failure.papers} == WORKS


def parsed(line):
    """The command's name and its options, as the real command line reads them."""
    program, name, *arguments = shlex.split(line)
    assert program == "fullrank"
    command = typer.main.get_command(app).commands[name]
    return name, command.make_context(name, arguments, resilient_parsing=False).params


@each
@pytest.mark.parametrize("model", ["./here", "org/model", "'arch:gpt2?n_layer=2&n_embd=8' --init"])
def test_its_command_is_one_that_the_command_line_takes(failure, model):
    name, options = parsed(failure.command.format(model=model))
    assert name == "examine"
    assert options["specs"] == [shlex.split(model)[0]]
    asked = {"verify", "gradients", "weights", "contexts", "dtype"}
    assert any(options[option] for option in asked), "it asks for nothing that this run had not"


def test_the_demo_is_tested_by_its_own_command():
    assert parsed("fullrank demo --verify")[1]["verify"] is True


def test_an_option_that_is_none_does_not_parse():
    with pytest.raises(Exception, match="--verity"):
        parsed("fullrank examine ./here --verity")


# ---------------------------------------------------------------- the command of a verdict


def suspicious():
    suspicion = Suspicion("A claim.", "decoder", Severity.NOTE)
    words = dict.fromkeys(("title", "means", "harmless", "tested", "refuted_by"), "")
    command = "fullrank examine {model} --verify"
    return Failure("one", **words, command=command, papers=(), valid_for="any", look=lambda _: Looked((suspicion,)))


@pytest.mark.parametrize(
    ("about", "specs", "init"),
    [
        ({"model": "org/model", "architecture": "GPT2Model", "fresh": False}, ["org/model"], False),
        ({"model": "./my runs/a&b", "architecture": "GPT2Model", "fresh": False}, ["./my runs/a&b"], False),
        ({"model": "arch:gpt2?n_layer=2&n_embd=8", "architecture": "GPT2Model", "fresh": True}, None, True),
        ({"model": "python:factory:make", "architecture": "Mine", "fresh": None}, ["python:factory:make"], False),
        ({"model": "GPT2Model", "architecture": "GPT2Model", "fresh": None}, ["SPEC"], False),  # passed as a module
        ({}, ["SPEC"], False),
    ],
)
def test_the_command_of_a_verdict_reads_the_same_model_again_through_a_shell(about, specs, init):
    (verdict,) = diagnose(Evidence((), about), [suspicious()]).verdicts
    name, options = parsed(verdict.command)
    assert name == "examine"
    assert options["specs"] == (specs or [about["model"]])
    assert options["init"] is init
    assert options["verify"] is True


# ---------------------------------------------------------------- thresholds


def test_every_threshold_is_of_a_failure_or_of_what_they_share():
    owners = {name.split(".")[0] for name in THRESHOLDS}
    assert owners - SHARED <= {failure.name for failure in FAILURES}
    assert owners >= SHARED


@pytest.mark.parametrize("one", THRESHOLDS.values(), ids=lambda one: one.name)
def test_a_threshold_has_its_reason_and_its_unit(one):
    assert re.fullmatch(r"[a-z-]+(\.[a-z_]+)+", one.name)
    assert len(one.reason.split()) >= 2
    assert one.unit
    assert not one.reason.endswith(".")


def sources():
    return {path.stem: path.read_text(encoding="utf-8") for path in ROOM.glob("*.py") if path.stem != "thresholds"}


@pytest.mark.parametrize("name", [name for name in THRESHOLDS if not name.startswith("effect.")])
def test_every_threshold_is_compared_with_by_code(name):
    owner, _, limit = name.partition(".")
    written = (f'"{name}"', f'.{limit}"')  # in full, or after the name of the failure: f"{NAME}.share"
    using = [
        stem
        for stem, text in sources().items()
        if written[0] in text or (f'NAME = "{owner}"' in text and f"{{NAME}}{written[1]}" in text)
    ]
    assert using, f"{name} is used by nobody"


def test_the_limits_of_effects_are_one_for_each_outcome():
    from typing import get_args

    from fullrank.diagnosis.thresholds import effect_limits
    from fullrank.report.verdict import Outcome

    assert {name for name, _ in effect_limits()} == set(get_args(Outcome))


def test_every_name_that_code_compares_with_is_a_threshold():
    asked = {name for text in sources().values() for name in re.findall(r'threshold\("([^"]+)"\)', text)}
    assert asked
    assert asked <= set(THRESHOLDS)
