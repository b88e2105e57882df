import os

import pytest
from typer.testing import CliRunner

import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny BERT with a tokenizer."""
    return tiny.save_tokenizer(tiny.save_bert(tmp_path_factory.mktemp("cli") / "bert"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def fullrank(here):
    """Run the command line in an empty directory."""
    from fullrank.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, [os.fspath(argument) for argument in arguments])

    return run
