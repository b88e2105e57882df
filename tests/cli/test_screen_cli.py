"""`fullrank screen`: what is tried, shown, written; and refusals that leave nothing behind."""

import json

import pytest
from rich.cells import cell_len

from fullrank.report import Screening
from fullrank.report.screened import GROUPS

GPT2 = "arch:gpt2?n_layer=2&n_embd=16&n_head=2&vocab_size=50&n_positions=32"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def refused(fullrank, here):
    """Screen, asking for a page, and be refused."""

    def run(says, *arguments, spec=GPT2):
        before = sorted(here.rglob("*"))
        result = fullrank("screen", spec, "--init", *arguments, "--html", "page.html")
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("fullrank: ")
        assert result.stderr.count("\n") == 1
        assert says in result.stderr
        assert sorted(here.rglob("*")) == before

    return run


def test_without_steps_candidates_are_grouped_and_the_meaning_of_each_group_is_read_to_its_end(fullrank):
    result = fullrank(
        "screen", GPT2, "--init", "--try", "center-attention", "--try", "attn-scale", "--try", "registers"
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(cell_len, lines)) <= 80
    said = " ".join(result.stdout.split())
    assert "nothing is ranked; --steps 150 trains each and ranks by loss" in said
    assert "shows only in training: nothing changes before the first step" in said
    assert "could not be applied: the model is untouched" in said
    assert "registers: " in said
    assert "before and after: similarity" in said
    assert "from identity: how far the network is from doing nothing" in said
    assert "--steps 150" in said


def test_a_heading_that_is_longer_than_the_line_is_folded_and_not_cut(fullrank):
    result = fullrank("screen", GPT2, "--init", "--try", "contranorm", "--try", "rezero")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    meanings = {
        "restores: its numbers came at least half of the way to where they should be, for every failure that is named",
        "restores in part: its numbers did so for some of the failures that are named, and not for others",
        "does not restore: its numbers came less than half of the way, or went away from there",
    }
    assert any(meaning in said for meaning in meanings)
    headings = sum(said.count(f"{group}: its numbers") for group in GROUPS)
    assert headings == sum(said.count(meaning) for meaning in meanings)


def test_with_steps_it_is_ranked_and_the_page_and_the_json_say_the_same(fullrank, here):
    tried = ("--try", "residual-scale", "--try", "value-residual + rezero", "--steps", "2", "--rates", "1e-3,3e-3")
    result = fullrank("screen", GPT2, "--init", *tried, "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert max(map(cell_len, result.stdout.splitlines()[:-1])) <= 80  # the last is a path
    said = " ".join(result.stdout.split())
    assert "after 2 steps, ranked by loss" in said
    assert "value-residual + rezero" in said
    assert "The page: " in said
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "value-residual + rezero" in page

    found = fullrank("screen", GPT2, "--init", *tried, "--json")
    made = Screening.from_json(found.stdout)
    assert made.steps == 2
    assert {row.variant for row in made.candidates} == {"residual-scale", "value-residual + rezero"}
    assert all(row.loss is not None for row in made.rows)
    assert set(json.loads(found.stdout)) == {"schema", "steps", "about", "said", "screened", "profiles", "notes"}


def test_ones_own_text_is_trained_on(fullrank, here, checkpoint):
    (here / "tides.txt").write_text("the tide and the moon\n\n" * 60)
    arguments = ("--text", "tides.txt", "--on-data", "--steps", "2", "--rates", "1e-3", "--context", "8", "--json")
    result = fullrank("screen", _language(checkpoint, here), "--try", "attn-scale", *arguments)
    assert result.exit_code == 0, result.output
    made = Screening.from_json(result.stdout)
    assert made.about["task"] == "your data"
    assert made.about["chance"] is None
    assert made["attn-scale"].change is not None


def _language(checkpoint, here):
    """A tiny GPT-2 that says words, beside the tokenizer of the tiny BERT."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    from fullrank.spec.quiet import forked_rng, quiet

    ends = {"bos_token_id": 2, "eos_token_id": 3}
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    with quiet(), forked_rng(1):
        GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(here / "gpt2")
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, here / "gpt2" / file.name)
    return here / "gpt2"


def test_recommendations_and_seeds_are_options_of_training(fullrank):
    arguments = ("--steps", "2", "--seeds", "2", "--recommendations", "--rates", "1e-3", "--json")
    result = fullrank("screen", GPT2, "--init", "--try", "residual-scale", *arguments)
    assert result.exit_code == 0, result.output
    made = Screening.from_json(result.stdout)
    assert made.about["seeds"] == 2
    assert "warm-up" in [row.variant for row in made.rows if row.kind == "recommendation"]
    assert made["residual-scale"].change.seeds == 2


def test_unknown_remedies_are_refused_before_anything_is_loaded(refused):
    refused(
        "'residual-scal' is no remedy (did you mean 'residual-scale'", "--try", "residual-scal", spec="no-such-model"
    )
    refused("residual-scale is named twice", "--try", "residual-scale + residual-scale", spec="no-such-model")
    refused("start=1000 of attn-scale is not accepted", "--try", "attn-scale?start=1000", spec="no-such-model")


@pytest.mark.parametrize("option", [["--recommendations"], ["--rates", "1e-3"], ["--seeds", "3"], ["--on-data"]])
def test_options_of_training_without_steps_are_refused(refused, option):
    refused("are of training: give --steps too", *option)


def test_text_to_train_on_must_be_named_and_rates_be_rates(refused):
    refused("--on-data trains on what --text or --data gives", "--on-data", "--steps", "2")
    refused("--rates 'quick' are no learning rates", "--steps", "2", "--rates", "quick")
    refused("--rates '1e-3,-1' are no learning rates", "--steps", "2", "--rates", "1e-3,-1")


def test_a_model_that_is_none_and_a_page_that_cannot_be_written_are_refused(refused, fullrank, here):
    refused("no-such-model", spec="./no-such-model")
    result = fullrank("screen", GPT2, "--init", "--html", "none/page.html")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_number_of_steps_below_0_is_a_usage_error(fullrank):
    assert fullrank("screen", GPT2, "--steps", "-1").exit_code == 2
