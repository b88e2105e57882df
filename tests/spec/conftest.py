import shutil

import pytest

import tiny


@pytest.fixture(scope="session")
def bert_master(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    return tiny.save_tokenizer(tiny.save_bert(directory))


@pytest.fixture
def bert(bert_master, tmp_path):
    """A tiny BERT with a tokenizer, to be spoilt as the test likes."""
    return shutil.copytree(bert_master, tmp_path / "bert")
