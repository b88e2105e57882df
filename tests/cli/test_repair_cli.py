"""`fullrank repair`: applied, said, saved, examined as saved; refused in one sentence with nothing left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

import fullrank as library
from fullrank.report import Report


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def refused(fullrank, here, checkpoint):
    """Repair, asking for a directory, and be refused."""

    def run(says, *arguments):
        before = sorted(here.rglob("*"))
        result = fullrank("repair", *arguments, "--out", "repaired")
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("fullrank: ")
        assert result.stderr.count("\n") == 1
        assert says in result.stderr
        assert sorted(here.rglob("*")) == before
        return result.stderr

    return run


def test_without_a_directory_it_says_what_was_changed_and_writes_nothing(fullrank, here, checkpoint):
    result = fullrank("repair", checkpoint, "attn-scale?start=0.5", "value-residual")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "attn-scale?start=0.5 at encoder layer 1 self" in said
    assert "4 parameters added; the output moves by" in said
    assert "value-residual [identity-now]" in said
    assert "Nothing was written; --out DIR saves the repaired model." in said
    assert list(here.iterdir()) == []


def test_what_was_saved_is_examined_repaired_and_loaded_into_a_plain_model(fullrank, here, checkpoint):
    result = fullrank("repair", checkpoint, "attn-scale?start=0.5", "residual-scale", "--out", "repaired")
    assert result.exit_code == 0, result.output
    directory = here / "repaired"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {one.name for one in directory.iterdir()}
    assert [one.name for one in here.iterdir()] == ["repaired"]  # no part of a directory is left beside it
    assert "next: fullrank examine repaired" in result.stdout

    told = json.loads((directory / "config.json").read_text())["fullrank_repairs"]
    assert [one["name"] for one in told] == ["attn-scale", "residual-scale"]
    examined = Report.from_json(fullrank("examine", "repaired", "--json", "--no-reference").stdout)
    assert any("repaired, as it was saved, with attn-scale, residual-scale" in note for note in examined.about["notes"])
    plain = Report.from_json(fullrank("examine", checkpoint, "--json", "--no-reference").stdout)
    assert _last(examined) != _last(plain)

    with torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint)).eval()
    repair = library.load_repaired(model, directory)
    weights = load_file(directory / "model.safetensors")
    assert [name for name in weights if "fullrank_attn_scale" in name]
    assert repair.parameters == sum(one.numel() for name, one in weights.items() if ".fullrank_" in name)
    again = library.examine(str(directory), spectrum=False, reference=False)
    assert _last(again) == pytest.approx(_last(examined), rel=1e-6)


def _last(report):
    rows = [row for row in report.rows if (row.site, row.part, row.metric) == ("stream", "out", "similarity")]
    return max(rows, key=lambda row: row.layer).value


def test_json_is_json_only_and_says_what_was_done(fullrank, here, checkpoint):
    result = fullrank("repair", checkpoint, "temperature?scale=2", "scaled-init", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"remedies", "notes", "out"}
    first, second = found["remedies"]
    assert set(first) == {"name", "parameters", "exactness", "where", "added", "output_moved"}
    assert (first["name"], second["name"]) == ("temperature", "scaled-init")
    assert first["parameters"]["scale"] == 2.0
    assert sum(first["added"].values()) == 4  # two heads in two layers
    assert second["added"] == {}
    assert first["output_moved"]["relative"] > 0
    assert found["out"] is None
    assert list(here.iterdir()) == []


def test_json_has_no_number_for_an_output_of_another_form(fullrank, here, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4)).save_pretrained(tmp_path / "vit")
    result = fullrank("repair", tmp_path / "vit", "reduce-tokens", "--out", here / "new", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["remedies"]
    assert found["output_moved"] == {"largest": None, "relative": None}
    assert (here / "new" / "model.safetensors").exists()


def test_json_names_the_directory_that_was_written(fullrank, here, checkpoint):
    result = fullrank("repair", checkpoint, "scaled-init", "--out", here / "new", "--json")
    assert json.loads(result.stdout)["out"] == str((here / "new").resolve())
    assert (here / "new" / "model.safetensors").exists()


def test_an_unknown_remedy_is_refused_with_names_like_it(refused, checkpoint):
    refused("'atn-scale' is no remedy (did you mean 'attn-scale'", checkpoint, "atn-scale")


def test_a_remedy_named_twice_is_refused(refused, checkpoint):
    refused("attn-scale is named twice", checkpoint, "attn-scale", "attn-scale?start=1")


def test_a_parameter_that_is_none_or_out_of_range_is_refused(refused, checkpoint):
    refused("strat= is no parameter of attn-scale (did you mean 'start'", checkpoint, "attn-scale?strat=1")
    refused("start=1000 of attn-scale is not accepted; it is a number at least -1", checkpoint, "attn-scale?start=1000")
    refused("kind='entropi' of temperature is not known", checkpoint, "temperature?kind=entropi")


def test_a_remedy_that_does_not_fit_says_why(refused, checkpoint):
    refused("no norm before a branch", checkpoint, "layernorm-scaling")
    refused("registers", checkpoint, "attn-scale", "registers")  # what fits comes first, and is not kept


def test_a_directory_that_holds_something_is_refused_before_anything_is_loaded(refused, here, fullrank, checkpoint):
    (here / "repaired").mkdir()
    (here / "repaired" / "mine").write_text("dear")
    refused("'repaired' is not empty; name a new directory", "no-such-model", "attn-scale")
    assert (here / "repaired" / "mine").read_text() == "dear"


def test_a_file_and_a_missing_parent_are_refused(fullrank, here, checkpoint):
    (here / "file").write_text("")
    for out, says in (("file", "is a file"), ("none/new", "does not exist")):
        result = fullrank("repair", checkpoint, "attn-scale", "--out", out)
        assert result.exit_code == 2
        assert says in result.stderr
    assert [one.name for one in here.iterdir()] == ["file"]


def test_a_repaired_checkpoint_is_not_repaired_with_the_same_again(fullrank, here, checkpoint):
    assert fullrank("repair", checkpoint, "attn-scale", "--out", "once").exit_code == 0
    result = fullrank("repair", "once", "attn-scale", "--out", "twice")
    assert result.exit_code == 2
    assert "attn-scale is in force on this" in result.stderr
    assert [one.name for one in here.iterdir()] == ["once"]
    both = fullrank("repair", "once", "value-residual", "--out", "twice")
    assert both.exit_code == 0, both.output
    told = json.loads((here / "twice" / "config.json").read_text())["fullrank_repairs"]
    assert [one["name"] for one in told] == ["attn-scale", "value-residual"]


def test_no_remedy_is_a_usage_error(fullrank, checkpoint):
    result = fullrank("repair", checkpoint)
    assert result.exit_code == 2
    assert "REMEDY" in result.stderr
