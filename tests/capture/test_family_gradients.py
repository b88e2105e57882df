"""Every family's gradients: where each backward goes, checked by an identity that needs no second implementation.

An attention call is linear in its values: Σ_s v_s · ∂v_s = Σ_t o_t · ∂o_t with o = A V, for each sequence and
each key-value head. A gradient with heads, tokens or sequences mixed up does not obey it.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from families import FAMILIES, REFUSED, observed
from seen import tensors
from torch.testing import assert_close

from fullrank.capture import AttentionCall, GradientState, Recorder

UNSEEN = frozenset({"gemma3n", "reformer"})  # several streams side by side; a backward of its own without a graph
BACKLESS = frozenset({"plain_in_place"})  # overwrites what its own backward needs: plain autograd refuses it too
SHARED = frozenset({"prophetnet"})  # values of the main stream also serve the predicting one: ∂v has a second source


class Products:
    """v · ∂v and o · ∂o of every call, summed over tokens."""

    needs = frozenset({"attention", "gradient"})

    def __init__(self):
        self.forward, self.back, self.reasons = {}, {}, set()

    def see(self, event):
        if isinstance(event, AttentionCall):
            key = (event.stack, event.layer, event.part)
            self.forward[key] = event.value.clone(), event.attention.matmat(event.value)
        elif isinstance(event, GradientState) and event.value is None:
            self.reasons.add((event.which, event.reason))
        elif isinstance(event, GradientState) and event.which in ("v", "output"):
            key = (event.stack, event.layer, event.part)
            value = self.forward[key][0 if event.which == "v" else 1]
            self.back[(*key, event.which)] = value.double() * event.value.double()

    def rows(self):
        return []

    def merge(self, other):
        raise AssertionError("nothing is merged here")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(REFUSED) - BACKLESS))
def test_values_and_outputs_of_a_call_meet_the_same_gradient(family):
    seen = observed(family)
    model, keep = seen.case.model, Products()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with Recorder(model, [keep], anatomy=seen.recorder.anatomy) as recorder, torch.enable_grad():
        model(**seen.case.batch)
        ends = [end.value for end in recorder.ends() if not end.into]
        wanted = [p for p in model.parameters() if p.requires_grad] + recorder.watch.starts
        if ends:
            generator = torch.Generator().manual_seed(0)
            G = [torch.randn(end.shape, generator=generator) for end in ends]
            torch.autograd.grad(ends, wanted, G, allow_unused=True)
    assert all(not p.requires_grad and p.grad is None for p in frozen)
    assert all(p.grad is None for p in model.parameters())
    calls = {key for key in keep.forward if (*key, "output") in keep.back}
    assert bool(ends) == (family not in UNSEEN)
    assert calls == (set(keep.forward) if ends else set())
    assert bool(keep.reasons) == (family in UNSEEN)
    for key in calls if family not in SHARED else ():
        of_values, of_output = keep.back[(*key, "v")], keep.back[(*key, "output")]
        values, output = of_values.sum((-2, -1)), of_output.sum((-2, -1))
        output = output.unflatten(1, (values.shape[1], -1)).sum(-1)  # heads that share their values
        size = of_output.abs().sum((-2, -1)).amax().item()
        assert_close(values, output, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("family", sorted(BACKLESS))
def test_a_model_that_plain_autograd_refuses_is_refused_under_the_recorder_in_the_same_words(family):
    seen, said = observed(family), []
    for under in (contextlib.nullcontext(), Recorder(seen.case.model, [Products()], anatomy=seen.recorder.anatomy)):
        with under, torch.enable_grad():
            (output,) = tensors(seen.case.model(**seen.case.batch))
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as refusal:
                output.sum().backward()
            said.append(str(refusal.value))
    assert said[0] == said[1]
    seen.case.model.zero_grad(set_to_none=True)
