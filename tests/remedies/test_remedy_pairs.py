"""Every two remedies that change the structure of a model: together, or refused in a sentence; nothing is left."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from refusals import REFUSED
from remedy_patients import build, stir

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies import CATALOGUE
from untouched import changes, everything

NAMES = [one for one in CATALOGUE if CATALOGUE[one].structural and (one, "gpt2") not in REFUSED]
NAMES = [one for one in NAMES if CATALOGUE[one].acts_on != "state space"]

_OWN_KERNEL = "computed in the kernel's place by another edit already"
_SOFTMAX = "(differential|entropy-regulariser) needs the map of a softmax"
_OWN_SUM = "adds to its stream is not returned by modules|its branches were not found"
_WIDER = "cannot be used in"

_NORMS = "no norm before a branch|norms of .* stand otherwise"

REFUSALS: dict[str, str] = {
    "softpick": f"{_SOFTMAX}|{_OWN_KERNEL}|what the kernel was given could not be told",
    "softcap": f"{_SOFTMAX}|{_OWN_KERNEL}",
    "learned-sink": f"{_SOFTMAX}|{_OWN_KERNEL}",
    "differential": _SOFTMAX,
    "entropy-regulariser": _SOFTMAX,
    "contranorm": _OWN_SUM,
    "hopfield": _WIDER,  # values are widened with what is carried
    "residual-scores": _WIDER,
    "rezero": _NORMS,
    "batch-norm": _NORMS,
    "qkv-norm": _NORMS,
    "peri-norm": "normalises what it adds too",  # so that what it reads may be of any size
    "sigma-reparam": "is made by a parametrisation",  # its weights are made of others
}
"""First remedy → the reasons for which some do not go after it; every other pair goes together."""


@pytest.mark.slow
@pytest.mark.parametrize("first", NAMES)
def test_pairs_apply_and_leave_nothing(first):
    case = build("gpt2")
    with torch.no_grad():
        base = case()
    state = everything(case.model)
    for second in (one for one in NAMES if one != first):
        _check(case, first, second)
        with torch.no_grad():
            assert torch.equal(case(), base), second
        assert [what for what in changes(state, everything(case.model)) if what != "versions"] == []


def _check(case, first, second):
    known = {id(p) for p in case.model.parameters()}
    with fullrank.repair(case.model, first, batch=case.batch) as outer:
        try:
            inner = fullrank.repair(case.model, second, batch=case.batch)
        except RemedyError as refusal:
            assert first in REFUSALS, str(refusal)
            assert re.search(REFUSALS[first], str(refusal)), str(refusal)
            assert str(refusal).startswith(f"{second} cannot be applied after {first}: ")
            assert "\n" not in str(refusal)
        else:
            with inner:
                _check_together(case, known, second)
                assert inner.undo().endswith("as it was, bit for bit."), second
        assert outer.undo().endswith("as it was, bit for bit."), second


def _check_together(case, known, second):
    added = {name: p for name, p in case.model.named_parameters() if id(p) not in known}
    kept = {name: p.detach().clone() for name, p in added.items()}
    stir(added, 0.1)
    with torch.no_grad():
        assert torch.isfinite(case()).all(), second
        for name, p in added.items():
            p.copy_(kept[name])


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(["attn-scale", "layer-scale", "hopfield"])))
def test_some_pairs(first, second):
    case = build("gpt2")
    with torch.no_grad():
        base = case()
    _check(case, first, second)
    with torch.no_grad():
        assert torch.equal(case(), base)
