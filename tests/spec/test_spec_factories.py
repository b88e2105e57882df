import sys

import pytest
import torch

from fullrank.errors import SpecError
from fullrank.spec import load


def refused(says, *args, **kwargs):
    """Loading ends in one sentence that says so."""
    with pytest.raises(SpecError, match=says) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module into the current directory under a name no other test has."""
    monkeypatch.chdir(tmp_path)
    name = f"factory_{request.node.name.split('[')[0]}"

    def write(body):
        (tmp_path / f"{name}.py").write_text("import torch\n" + body)
        return f"python:{name}"

    yield write
    sys.modules.pop(name, None)


def test_a_factory_in_the_current_directory_gives_a_model(module):
    path = list(sys.path)
    subject = load(module("def make():\n    return torch.nn.Linear(2, 3)\n") + ":make", dtype="float64")
    assert isinstance(subject.model, torch.nn.Linear)
    assert subject.dtype == torch.float64
    assert not subject.model.training
    assert (subject.batch, subject.fresh, subject.modality) == (None, None, "unknown")
    assert sys.path == path


def test_a_factory_may_give_a_batch_as_well(module):
    subject = load(module("def make():\n    return torch.nn.Linear(2, 3), torch.ones(5, 2)\n") + ":make")
    assert torch.equal(subject.batch, torch.ones(5, 2))


@pytest.mark.parametrize(
    ("body", "name", "says"),
    [
        ("def make():\n    return 3\n", "make", "returned int"),
        ("def make():\n    raise ValueError('no such data')\n", "make", "raised ValueError: no such data"),
        ("def make(size):\n    return size\n", "make", "raised TypeError"),
        ("def make():\n    return 3\n", "mkae", "did you mean 'make'"),
        ("make = 3\n", "make", "is int"),
        ("make = torch.nn.Linear(1, 1)\n", "make", "is Linear"),
        ("raise RuntimeError('broken')\n", "make", "importing .* failed with RuntimeError: broken"),
    ],
)
def test_a_factory_that_gives_no_model_is_named(module, body, name, says):
    refused(says, module(body) + f":{name}")


def test_a_module_that_is_not_there_is_named():
    refused("importing no_such_module_here failed", "python:no_such_module_here:make")


def test_init_and_revision_belong_to_checkpoints(module, bert):
    refused("makes its own", module("def make():\n    return torch.nn.Linear(1, 1)\n") + ":make", init=True)
    refused("revision='main' belongs to hub ids", str(bert), revision="main")
