"""Weights that are not all in memory: the same rows, and they are put away as they were found."""

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import BertModel, GPT2Config, GPT2Model
from typer.testing import CliRunner

import fullrank
from alike import differences
from fullrank.cli.app import app
from fullrank.errors import SpecError
from fullrank.spec import load
from fullrank.spec.memory import budget
from tiny import as_pickle, save_bert
from untouched import changes, everything

IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2Model(config).eval()


def on_cpu(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def partly(model, folder):
    places = {name: "cpu" for name, _ in model.named_children()} | {"h": "disk"}
    return dispatch_model(model, places, offload_dir=str(folder), main_device="cpu")


def files(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def state(model):
    """But for which objects they are: a weight that was fetched and put away again is another one."""
    found = everything(model) | {
        "devices": [p.device.type for p in model.parameters()],
        "accelerate": [id(getattr(m, "_hf_hook", None)) for m in model.modules()],
    }
    return {what: value for what, value in found.items() if what not in ("objects",)}


@pytest.mark.parametrize("way", [on_cpu, on_disk, partly])
def test_an_offloaded_model_has_the_rows_of_the_plain_one_and_stays_offloaded(way, tmp_path):
    whole = fullrank.examine(gpt2(), IDS)
    model = way(gpt2(), tmp_path)
    before, stored = state(model), files(tmp_path)
    report = fullrank.examine(model, IDS)
    assert not differences(report, whole)
    assert not changes(before, state(model))
    assert "meta" in before["devices"]
    assert files(tmp_path) == stored
    assert report.about["device"] == "cpu"
    assert report.about["dtype"] == "float32"
    assert report.about["parameters"] == whole.about["parameters"]
    assert any(note.startswith("offloaded:") for note in report.about["notes"])
    assert not any(note.startswith("offloaded:") for note in whole.about["notes"])


def test_weights_are_fetched_and_gradients_of_them_are_not_available(tmp_path):
    model = on_disk(gpt2(), tmp_path)
    before = state(model)
    options = {"spectrum": False, "weights": True, "gradients": True}
    report, whole = fullrank.examine(model, IDS, **options), fullrank.examine(gpt2(), IDS, **options)
    assert not changes(before, state(model))
    rows, expected = ({row.key: row for row in one.rows if row.site != "gradient"} for one in (report, whole))
    assert any(row.site == "weights" and row.value is not None for row in expected.values())
    assert rows == expected
    norms = report.rows.where(metric="gradient_norm").rows
    assert norms
    for row in norms:
        assert row.value is None
        assert "offloaded" in row.note


def test_an_interrupted_forward_leaves_the_weights_away(tmp_path, monkeypatch):
    model = on_disk(gpt2(), tmp_path)
    before = state(model)
    calls = []

    def stop(*args, **kwargs):
        calls.append([p.device.type for p in model.parameters()])
        if len(calls) == 8:  # the survey's forward has five norms: in the middle of the one that is observed
            raise KeyboardInterrupt
        return layer_norm(*args, **kwargs)

    layer_norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", stop)
    with pytest.raises(KeyboardInterrupt):
        fullrank.examine(model, IDS)
    monkeypatch.undo()
    assert calls[-1] != before["devices"]  # weights were there when it ended
    assert not changes(before, state(model))
    assert not differences(fullrank.examine(model, IDS), fullrank.examine(gpt2(), IDS))


# ---------------------------------------------------------------- a budget


def folders():
    return set(Path(tempfile.gettempdir()).glob("fullrank-offload-*"))


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
def test_a_checkpoint_over_the_budget_has_the_same_rows_and_leaves_no_folder(pickled, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    place = save_bert(tmp_path / "bert", num_hidden_layers=4)
    if pickled:
        as_pickle(place)
    plain = load(str(place), allow_pickle=pickled)
    size = sum(p.nbytes for p in plain.model.parameters())
    subject = load(str(place), memory=size // 2, allow_pickle=pickled)
    assert any(p.is_meta for p in subject.model.parameters())
    assert any(not p.is_meta for p in subject.model.parameters())
    assert len(folders()) == 1
    report, whole = (fullrank.examine(one, {"input_ids": IDS}) for one in (subject, plain))
    assert not differences(report, whole)
    assert report.about["device"] == "cpu"
    del subject
    gc.collect()
    assert not folders()


def test_a_budget_that_everything_fits_in_changes_nothing(tmp_path):
    place = save_bert(tmp_path)
    subject = load(str(place), memory="1GiB")
    assert isinstance(subject.model, BertModel)
    assert not any(p.is_meta for p in subject.model.parameters())
    whole = fullrank.examine(load(str(place)), {"input_ids": IDS})
    assert not differences(fullrank.examine(subject, {"input_ids": IDS}), whole)


def test_a_checkpoint_that_cannot_be_read_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    place = save_bert(tmp_path / "bert")
    (place / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SpecError):
        load(str(place), memory="1kB")
    assert not folders()


def test_budgets_are_read():
    assert budget("2GiB") == 2**31
    assert budget("500 MB") == 500_000_000
    assert budget("1.5kib") == 1536
    assert budget(7) == budget("7") == budget("7B") == 7


@pytest.mark.parametrize("wrong", ["lots", "2 GiBs", "-1GiB", "0", "", True, "1e9"])
def test_what_is_no_budget_is_refused(wrong):
    with pytest.raises(SpecError, match="memory="):
        budget(wrong)


def test_only_checkpoints_have_a_budget(tmp_path):
    for spec, options in (("arch:llama", {}), (str(save_bert(tmp_path)), {"init": True}), ("python:a.b:c", {})):
        with pytest.raises(SpecError, match="made in memory"):
            load(spec, memory="1GiB", **options)
    with pytest.raises(SpecError, match="loaded already"):
        fullrank.examine(gpt2(), IDS, memory="1GiB")


def test_the_command_line_takes_a_budget(tmp_path):
    place = save_bert(tmp_path)
    asked = ["examine", str(place), "--json", "--no-spectrum", "--context", "16", "--documents", "2"]
    small, plain = (CliRunner().invoke(app, [*asked, *more]) for more in (["--memory", "10kB"], []))
    assert small.exit_code == plain.exit_code == 0, small.output
    one, other = (json.loads(answer.stdout) for answer in (small, plain))
    assert one["rows"] == other["rows"]
    assert any(note.startswith("offloaded:") for note in one["about"]["notes"])
    wrong = CliRunner().invoke(app, [*asked, "--memory", "lots"])
    assert wrong.exit_code == 2
    assert "memory='lots'" in wrong.stderr


# What examining itself needs, beside weights: activations of one block, one block's weights on their way in, and pages
# of the file that they are read from.
OVERHEAD = 64 * 2**20

PEAK = """
import json, sys
import torch, transformers, accelerate, fullrank, fullrank.verbs, fullrank.measure

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

place, memory = sys.argv[1:]
transformers.AutoModel  # imported before the peak is first read
from transformers import BertModel
fullrank.examine(BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)),
                 {"input_ids": torch.zeros(2, 8, dtype=torch.long)}, spectrum=False)
before = peak()
subject = fullrank.spec.load(place, memory=int(memory) or None)
ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
report = fullrank.examine(subject, {"input_ids": ids}, spectrum=False)
print(json.dumps([peak() - before, [[*map(str, row.key), row.value] for row in report.rows]]))
"""


@pytest.mark.slow
def test_the_peak_stays_below_the_budget_and_a_little_more(tmp_path):
    place = save_bert(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=32)
    size = (place / "model.safetensors").stat().st_size
    limit = size // 8
    assert size > limit + 2 * OVERHEAD
    answers = []
    for memory in (limit, 0):
        asked = [sys.executable, "-W", "ignore", "-c", PEAK, str(place), str(memory)]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=300, env=dict(os.environ))
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    (small, rows), (plain, plain_rows) = answers
    print(f"weights {size >> 20} MiB, budget {limit >> 20} MiB: peak {small >> 20} MiB; without {plain >> 20} MiB")
    assert rows == plain_rows
    assert small < limit + OVERHEAD
    assert small < plain
    assert plain > size * 0.9  # so that the limit is one
