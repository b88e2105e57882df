"""`fullrank metrics`, `fullrank demo`, `--version`, the progress bar, and how quickly it starts."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import version

import pytest

from fullrank.cli.progress import progress, time_left
from fullrank.metrics import VOCABULARY


def test_metrics_lists_every_metric(fullrank):
    result = fullrank("metrics")
    assert result.exit_code == 0
    words = result.stdout.split()
    assert [name for name in VOCABULARY if name not in words] == []


@pytest.mark.parametrize("name", ["similarity", "attention_s2"])
def test_one_metric_is_shown_in_full(fullrank, name):
    said = " ".join(fullrank("metrics", name).stdout.split())
    for field in ("definition", "unit", "healthy", "collapsed", "null", "source"):
        assert " ".join(str(getattr(VOCABULARY[name], field)).split()) in said


def test_the_vocabulary_in_json(fullrank):
    records = json.loads(fullrank("metrics", "--json").stdout)
    assert [record["name"] for record in records] == list(VOCABULARY)
    one = json.loads(fullrank("metrics", "rms", "--json").stdout)
    assert one["range"] == [0.0, "inf"]
    assert one["invariances"] == sorted(VOCABULARY["rms"].invariances)


def test_an_unknown_metric_is_answered_with_close_matches(fullrank):
    result = fullrank("metrics", "similarty")
    assert result.exit_code == 2
    assert "did you mean 'similarity'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert fullrank("metrics", "qqq").exit_code == 2


def test_version(fullrank):
    assert fullrank("--version").stdout == f"fullrank {version('fullrank')}\n"


@pytest.mark.slow
def test_the_demo_writes_its_page_and_ends_with_the_path(fullrank, here):
    result = fullrank("demo", "--no-spectrum")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"The page: {here / 'report.html'}")
    assert "all-MiniLM-L6-v2" in (here / "report.html").read_text()
    assert "next: fullrank demo --verify" in result.stdout  # its model has no SPEC that would name it
    assert [file.name for file in here.iterdir()] == ["report.html"]


def test_the_demo_without_its_extra_says_what_to_install(fullrank, here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = fullrank("demo")
    assert result.exit_code == 2
    assert "pip install 'fullrank[demo]'" in result.stderr
    assert list(here.iterdir()) == []


def test_starting_loads_nothing_heavy():
    """`fullrank --help` and a usage error must answer at once."""
    code = (
        "import sys\n"
        "from fullrank.cli import main\n"
        "sys.argv = ['fullrank', 'examine', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'plotly', 'pandas', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


CHATTY = """
import warnings

import torch

def make():
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    def chatter(*_):
        logging.get_logger("transformers.models.bert").warning("a log line")
        warnings.warn("a warning")

    size = dict(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertModel(BertConfig(**size))
    model.register_forward_pre_hook(chatter)
    return model, {"input_ids": torch.arange(8)[None]}
"""


@pytest.mark.slow
def test_what_transformers_says_during_the_examined_forward_is_not_shown(here):
    (here / "chatty.py").write_text(CHATTY)
    # a process of its own, as the command line has: transformers is imported only while the model is loaded
    command = [sys.executable, "-B", "-m", "fullrank", "examine", "python:chatty:make", "--no-spectrum"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "similarity" in done.stdout


# ---------------------------------------------------------------- a real terminal, a real Ctrl-C


@pytest.mark.slow
def test_ctrl_c_ends_the_installed_command_with_one_line_and_nothing_left(here):
    (here / "waiting.py").write_text("import time\ndef make():\n    print('ready', flush=True)\n    time.sleep(600)\n")
    command = [sys.executable, "-B", "-m", "fullrank", "examine", "python:waiting:make", "--html", "page.html"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell that runs the tests in the background has them, and what they start, ignore Ctrl-C
    with subprocess.Popen(
        command, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **streams
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said == "fullrank: interrupted; nothing was written.\n"
    assert [file.name for file in here.iterdir()] == ["waiting.py"]


@pytest.mark.slow
def test_a_real_terminal_sees_the_layers_pass_on_standard_error_only(here, checkpoint):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fullrank", "examine", str(checkpoint), "--init", "--dtype", "float64"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not piece:
                break
            seen += piece
        printed = process.communicate(timeout=120)[0]
    os.close(ours)
    assert process.returncode == 0
    assert b"loading" in seen
    assert b"layer 2 of 2" in seen
    assert "\x1b" not in printed  # a pipe gets plain text
    assert "similarity" in printed


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(**options) as tell:
        tell("loading", 0.0)
        for layer in range(2, 5):  # without a pause: each is drawn, however quickly the next one comes
            tell(f"decoder layer {layer} of 12", layer / 12)
    return stream.getvalue()


def test_a_terminal_is_told_the_layer_and_the_time_left(monkeypatch):
    said = shown(monkeypatch, Terminal(), shown=True)
    assert [layer for layer in range(2, 5) if f"decoder layer {layer} of 12" not in said] == []
    assert "s left" in said


def test_what_is_no_terminal_or_asked_for_json_is_told_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), shown=True) == ""
    assert shown(monkeypatch, Terminal(), shown=False) == ""


def test_time_left_in_words():
    assert time_left(3.4) == "about 3 s left"
    assert time_left(200) == "about 3 min left"
