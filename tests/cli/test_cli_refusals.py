"""Bad input: one clear sentence on standard error, exit code 2, nothing left behind."""

import shutil
import subprocess
import sys

import pytest

import tiny

SMALL = "arch:bert?hidden_size=16&num_hidden_layers=2&num_attention_heads=2&intermediate_size=32&vocab_size=40"


@pytest.fixture
def refused(fullrank, here):
    """Examine, asking for a page, and be refused."""

    def run(says, *arguments, page="page.html"):
        before = sorted(here.rglob("*"))
        result = fullrank("examine", *arguments, "--html", page)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("fullrank: ")
        assert result.stderr.count("\n") == 1
        assert says in result.stderr
        assert sorted(here.rglob("*")) == before
        return result.stderr

    return run


@pytest.fixture
def spoilt(checkpoint, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "spoilt")


def test_an_unknown_hub_id_or_no_network(refused):
    assert "pass a local directory" in refused("cannot be reached", "nobody/nothing")


def test_texts_that_are_no_spec(refused):
    refused("nothing is there", "./nowhere")
    assert "did you mean 'llama'" in refused("is no architecture", "arch:lama")
    refused("unknown to the configuration", f"{SMALL}&hiden_size=3")
    refused("importing", "python:no_such_module_here:make")


def test_a_pickle_only_checkpoint(refused, spoilt, fullrank):
    assert "--allow-pickle" in refused("are pickles", tiny.as_pickle(spoilt))
    assert fullrank("examine", spoilt, "--allow-pickle", "--no-spectrum").exit_code == 0


def test_remote_code(refused, spoilt):
    tiny.edit_config(spoilt, model_type="novel", auto_map={"AutoModel": "modeling.M"})
    assert "--trust-remote-code" in refused("Python code in its checkpoint", spoilt)


def test_a_corrupt_checkpoint(refused, spoilt):
    (spoilt / "model.safetensors").write_bytes(b"x" * 100)
    refused("cannot be loaded", spoilt)


def test_a_context_beyond_the_positions_and_one_token(refused, checkpoint, here):
    refused("has 64 learned positions; use context<=64", checkpoint, "--context", "65")
    refused("one token", checkpoint, "--context", "1")
    refused("documents=0", checkpoint, "--documents", "0")


def test_texts_that_cannot_be_read(refused, checkpoint, here):
    (here / "empty.txt").write_text(" \n")
    refused("is empty", checkpoint, "--text", "empty.txt")
    refused("cannot be read", checkpoint, "--text", "nowhere.txt")
    (here / "lines.jsonl").write_text('{"text": "the tide"}\n{"title": "the tide"}\n')
    refused("line 2", checkpoint, "--data", "lines.jsonl")
    refused("were both given", checkpoint, "--data", "lines.jsonl", "--text", "empty.txt")
    refused("reads text input", checkpoint, "--images", "picture.png")


def test_a_device_or_dtype_that_is_not_there(refused, checkpoint):
    refused("device='toaster'", checkpoint, "--device", "toaster")
    refused("dtype='int3'", checkpoint, "--dtype", "int3")


def test_a_model_without_blocks_or_with_blocks_that_are_not_there(refused, checkpoint, here):
    (here / "blockless.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 4), torch.ones(2, 5, 4)\n"
    )
    try:
        refused("blocks", "python:blockless:make")
    finally:
        sys.modules.pop("blockless", None)
        shutil.rmtree(here / "__pycache__", ignore_errors=True)
    refused("nowhere", checkpoint, "--blocks", "nowhere.layers")


def test_weights_that_are_not_finite(refused, spoilt):
    from safetensors.torch import load_file, save_file

    tensors = load_file(spoilt / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    refused("encoder.layer.1.output.dense", spoilt)


@pytest.mark.parametrize("path", ["nowhere/page.html", ".", "/proc/page.html", "-"])
def test_an_unwritable_page_is_refused_before_anything_is_loaded(refused, checkpoint, monkeypatch, path):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("fullrank.cli.job.loaded", load)
    refused("cannot be written", checkpoint, page=path)


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("is no head", ("--heads", "x")),
        ("leaves out", ("--heads", "1.0", "--no-spectrum")),
        ("at least one random projection", ("--gradients", "--probes", "0")),
        ("no time budget", ("--seconds", "-1")),
        ("cannot be compared", ("--contexts", "24,12")),
    ],
)
def test_options_that_no_model_could_take_are_refused_before_one_is_looked_for(refused, says, arguments):
    refused(says, "./nowhere", *arguments)


def test_an_existing_page_survives_a_refusal(fullrank, checkpoint, here):
    (here / "page.html").write_text("precious")
    assert fullrank("examine", checkpoint, "--context", "999", "--html", "page.html").exit_code == 2
    assert (here / "page.html").read_text() == "precious"


def test_ctrl_c_is_one_line_and_exit_code_130(fullrank, checkpoint, here, monkeypatch):
    def examine(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fullrank.verbs.examine.examine", examine)
    result = fullrank("examine", checkpoint, "--html", "page.html")
    assert result.exit_code == 130
    assert result.stderr == "fullrank: interrupted; nothing was written.\n"
    assert list(here.iterdir()) == []


def test_a_fault_of_our_own_is_not_taken_for_bad_input(fullrank, checkpoint, monkeypatch):
    def examine(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("fullrank.verbs.examine.examine", examine)
    result = fullrank("examine", checkpoint)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments", [["examine"], ["examine", "a", "b"], ["nonsense"], ["examine", "a", "--seed", "x"]]
)
def test_usage_errors_exit_with_2(fullrank, arguments):
    assert fullrank(*arguments).exit_code == 2


def test_the_installed_command_exits_with_2_and_without_a_traceback(here):
    result = subprocess.run(
        [sys.executable, "-m", "fullrank", "examine", "./nowhere"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "fullrank: SPEC './nowhere' looks like a path, but nothing is there.\n"
