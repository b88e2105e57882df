"""Every two remedies that change the structure of a model: together, or refused in a sentence; nothing is left."""

from __future__ import annotations

import itertools

import pytest
import torch
from patients import build, stir
from refusals import REFUSED

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies import CATALOGUE
from untouched import changes, everything

NAMES = [one for one in CATALOGUE if CATALOGUE[one].structural and (one, "gpt2") not in REFUSED]
NAMES = [one for one in NAMES if CATALOGUE[one].acts_on != "state space"]

REFUSALS: dict[tuple[str, str], str] = {}
"""(first, second) → words of the reason why the second does not go with the first."""


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
        if (first, second) in REFUSALS:
            with pytest.raises(RemedyError, match=REFUSALS[first, second]) as caught:
                fullrank.repair(case.model, second, batch=case.batch)
            assert "\n" not in str(caught.value)
        else:
            with fullrank.repair(case.model, second, batch=case.batch) as inner:
                added = {name: p for name, p in case.model.named_parameters() if id(p) not in known}
                kept = {name: p.detach().clone() for name, p in added.items()}
                stir(added, 0.1)
                with torch.no_grad():
                    assert torch.isfinite(case()).all(), second
                    for name, p in added.items():
                        p.copy_(kept[name])
                assert inner.undo().endswith("as it was, bit for bit."), second
        assert outer.undo().endswith("as it was, bit for bit."), second


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(["attn-scale", "layer-scale", "hopfield"])))
def test_some_pairs(first, second):
    case = build("gpt2")
    with torch.no_grad():
        base = case()
    _check(case, first, second)
    with torch.no_grad():
        assert torch.equal(case(), base)
