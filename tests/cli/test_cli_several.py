"""`fullrank examine A B C`: several models as one report."""

import json

import pytest

import tiny
from fullrank.report import Variants

SMALL = "arch:gpt2?n_layer={}&n_embd=8&n_head=2&n_positions=32&vocab_size=50&bos_token_id=49&eos_token_id=49"
ONE, TWO = SMALL.format(1), SMALL.format(2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return [
        tiny.save_tokenizer(tiny.save_bert(directory / f"checkpoint-{step}", initializer_range=step / 1e4))
        for step in (500, 1000)
    ]


def test_checkpoints_are_one_report_labelled_by_what_tells_them_apart(fullrank, checkpoints, here):
    result = fullrank("examine", *checkpoints, "--no-spectrum", "--html", "series.html")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "largest changes, checkpoint-500 → checkpoint-1000" in " ".join(result.stdout.split())
    assert result.stdout.rstrip().endswith(f"The page: {here / 'series.html'}")
    assert 'id="tab-series"' in (here / "series.html").read_text()


def test_json_holds_every_report(fullrank, checkpoints):
    result = fullrank("examine", *checkpoints, "--no-spectrum", "--json")
    variants = Variants.from_json(result.stdout)
    assert variants.labels == ("checkpoint-500", "checkpoint-1000")
    alone = fullrank("examine", checkpoints[1], "--no-spectrum", "--json")
    found, expected = json.loads(variants.reports[1].to_json()), json.loads(alone.stdout)
    for one in (found, expected):
        del one["about"]["created"], one["about"]["seconds"]  # of another run
    assert found == expected


def test_labels_are_given_one_for_each(fullrank):
    result = fullrank("examine", ONE, TWO, "--label", "small", "--label", "large", "--no-spectrum", "--json")
    assert Variants.from_json(result.stdout).labels == ("small", "large")
    refused = fullrank("examine", ONE, TWO, "--label", "small")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--label was given 1 times for 2 models" in refused.stderr


@pytest.mark.slow
def test_what_fails_is_said_and_the_others_are_shown(fullrank, here):
    result = fullrank("examine", ONE, "./lost", TWO, "--no-spectrum", "--json", "--html", "series.html")
    assert result.exit_code == 2
    variants = Variants.from_json(result.stdout)
    assert variants.labels == ("n_layer=1", "n_layer=2")
    assert [one.label for one in variants.failed] == ["lost"]
    assert "fullrank: lost was not examined: SPEC './lost' looks like a path" in result.stderr
    assert (here / "series.html").exists()


def test_where_all_fail_there_is_one_sentence(fullrank, here):
    result = fullrank("examine", "./lost", "./gone")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_several_revisions_of_one_id_are_several_models(fullrank):
    result = fullrank("examine", "org/model", "--revision", "v1", "--revision", "v2")
    assert result.exit_code == 2
    assert "hub id 'org/model' is not in the local cache" in result.stderr
    refused = fullrank("examine", ONE, TWO, "--revision", "v1", "--revision", "v2")
    assert refused.exit_code == 2
    assert "several revisions go with one SPEC" in refused.stderr


def test_revisions_of_what_has_none_are_refused(fullrank):
    result = fullrank("examine", ONE, "--revision", "v1")
    assert result.exit_code == 2
    assert "belongs to hub ids" in result.stderr
