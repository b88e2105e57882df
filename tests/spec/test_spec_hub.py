"""Hub ids, without a hub: its one answer is put in by hand."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

import tiny
from fullrank.errors import SpecError
from fullrank.spec import load


class NoNetworkError(Exception):
    """Which one it is depends on the hub's HTTP client."""


def answers(monkeypatch, answer):
    def model_info(self, name, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(HfApi, "model_info", model_info)


def refused(says, **kwargs):
    with pytest.raises(SpecError, match=says) as caught:
        load("someone/model", **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub_error(kind):
    return kind("told by the hub", response=SimpleNamespace(headers={}, request=None, status_code=404))


def test_offline_and_not_cached_says_how_to_pass_a_directory():
    assert "pass a local directory" in refused("cannot be reached")


def test_no_network_is_told_alike(monkeypatch):
    answers(monkeypatch, NoNetworkError("Name or service not known"))
    assert "pass a local directory" in refused("cannot be reached")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (RepositoryNotFoundError, "not on the Hugging Face hub"),
        (GatedRepoError, "is gated"),
        (RevisionNotFoundError, "revision='v2'"),
    ],
)
def test_what_the_hub_refuses_is_told(monkeypatch, kind, says):
    answers(monkeypatch, hub_error(kind))
    refused(says, revision="v2")


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """someone/model, downloaded earlier."""
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    return tiny.save_tokenizer(tiny.save_bert(repo / "snapshots" / commit))


def test_a_cached_model_needs_no_network(cached):
    subject = load("someone/model")
    assert subject.name == "someone/model"
    assert subject.vocabulary == 40
    assert subject.tokenizer is not None


def test_a_cached_pickle_is_refused_as_well(cached):
    tiny.as_pickle(cached)
    assert "--allow-pickle" in refused("are pickles")


def test_a_pickle_on_the_hub_is_refused_before_it_is_downloaded(cached, monkeypatch):
    names = ("config.json", "pytorch_model.bin")
    answers(monkeypatch, SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names]))
    refused("are pickles")
