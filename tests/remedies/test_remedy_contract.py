"""What holds of every remedy on every model: it acts or says why not, leaves no trace, is trained and saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from refusals import QUIET, REFUSED, VARIANTS
from remedy_patients import build, patients_of, stir
from safetensors.torch import load_file, save_file

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies import CATALOGUE, repairs_in
from untouched import changes, everything

SETTINGS = [text for name in CATALOGUE for text in (name, *VARIANTS.get(name, ()))]
CASES = [
    (text, patient)
    for text in SETTINGS
    for patient in patients_of(CATALOGUE[text.split("?")[0]].acts_on)
    if (text.split("?")[0], patient) not in REFUSED and (text, patient) not in REFUSED
]
QUICK = ("gpt2", "zoo_vision", "zoo_state_space")
"""These have every setting in the ordinary run, all others in the slow one; but for default settings of `PLAIN`."""
PLAIN = ("bert", "llama_padded", "torch_encoder", "plain_softmax")


def marked(remedy, patient):
    """One case, slow where it is one more of the same kind."""
    slow = patient not in QUICK and ("?" in remedy or patient not in PLAIN)
    return pytest.param(remedy, patient, id=f"{remedy}-{patient}", marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(autouse=True)
def reference_path():
    """`nn.TransformerEncoder` without its fused inference path, which an edit switches off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(("remedy", "patient"), [marked(*case) for case in CASES])
def test_life_of_a_repair(remedy, patient, tmp_path):
    """Applied, exact as declared, trained, saved, loaded into another model, refused a second time, undone."""
    case = build(patient)
    model, entry = case.model, CATALOGUE[remedy.split("?")[0]]
    with torch.no_grad():
        before = case()
    state = everything(model)
    known = {id(p) for p in model.parameters()}
    fresh = copy.deepcopy(model)

    repair = fullrank.repair(model, remedy, batch=case.batch)
    with torch.no_grad():
        applied = case()
    if entry.exactness == "identity-now" and remedy == entry.name:
        torch.testing.assert_close(applied, before, rtol=0, atol=1e-5)
    assert torch.isfinite(applied).all()
    assert repair.applied[0].proof.acts != (remedy in QUIET)
    assert [one["name"] for one in repairs_in(model)] == [entry.name]

    added = {name: p for name, p in model.named_parameters() if id(p) not in known}
    assert sum(p.numel() for p in added.values()) == repair.parameters
    plain = dict(fresh.named_parameters())
    written = any(not torch.equal(p, plain[name]) for name, p in model.named_parameters() if name in plain)
    kept = {name: p.detach().clone() for name, p in added.items()}
    _check_trained(case, added)
    _check_saved(case, fresh, remedy, tmp_path)
    with torch.no_grad():
        for name, parameter in added.items():
            parameter.copy_(kept[name])

    with pytest.raises(RemedyError, match="in force"):
        fullrank.repair(model, remedy, batch=case.batch)
    assert repair.undo().endswith("as it was, bit for bit.")
    after = everything(model)
    versions = (
        ("versions", "random") if written or entry.acts_on == "weights" else ()
    )  # values are written, and written back
    assert [what for what in changes(state, after) if what not in versions] == []
    with torch.no_grad():
        assert torch.equal(case(), before)


def _check_trained(case, added):
    """Every added parameter has a gradient, also where it starts at a point at which others hide it."""
    stir(added)
    case.model.train()  # what is different in training must have gradients too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = case()
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        ((out * probe).sum() + fullrank.remedies.penalty_of(case.model)).backward()
    case.model.eval()
    for name, parameter in added.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    for parameter in case.model.parameters():
        parameter.grad = None


def _check_saved(case, fresh, remedy, tmp_path: Path):
    """Weights saved with the model load into another one with the same remedies, and give the same answers."""
    with torch.no_grad():
        answer = case()
    save_file({n: t.clone().contiguous() for n, t in case.model.state_dict().items()}, tmp_path / "model.safetensors")
    stir(list(fresh.parameters()))
    with fullrank.repair(fresh, remedy, batch=case.batch):
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
        with torch.no_grad():
            torch.testing.assert_close(case.answer(fresh), answer, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("remedy", "patient"), [one for one in REFUSED if one[0].split("?")[0] in CATALOGUE], ids=str)
def test_a_remedy_that_does_not_fit_says_why_and_changes_nothing(remedy, patient):
    case = build(patient)
    state = everything(case.model)
    with pytest.raises(RemedyError, match=REFUSED[remedy, patient]) as caught:
        fullrank.repair(case.model, remedy, batch=case.batch)
    name = remedy.split("?")[0]
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    versions = ("versions",) if CATALOGUE[name].acts_on == "weights" else ()
    assert [what for what in changes(state, everything(case.model)) if what not in versions] == []


@pytest.mark.parametrize("remedy", CATALOGUE)
def test_after_training_the_structure_goes_and_the_weights_stay(remedy):
    patient = next(one for one in patients_of(CATALOGUE[remedy].acts_on) if (remedy, one) not in REFUSED)
    case = build(patient)
    names = list(case.model.state_dict())
    repair = fullrank.repair(case.model, remedy, batch=case.batch)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.data.mul_(1.01)
    trained = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    assert "keeps its trained weights." in repair.undo()
    assert list(case.model.state_dict()) == names
    for name, parameter in case.model.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("remedy", CATALOGUE)
def test_the_catalogue_says_what_users_need(remedy):
    entry = CATALOGUE[remedy]
    from fullrank.diagnosis.catalogue import FAILURES

    assert set(entry.addresses) <= {failure.name for failure in FAILURES}
    assert entry.addresses
    assert entry.formula
    assert entry.cost
    assert entry.papers
    assert entry.limits
    for parameter in entry.parameters:
        assert parameter.range
        assert parameter.checked(remedy, parameter.default) == parameter.default or parameter.optional
    assert list(Path(__file__).parent.rglob(f"test_remedy_{remedy.replace('-', '_')}.py"))
