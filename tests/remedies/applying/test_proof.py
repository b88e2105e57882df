"""The proof that a remedy acts: with NaN in outputs, of each parameter, and what is passed on to the next remedy."""

from __future__ import annotations

import gc

import pytest
import torch
from remedy_patients import build, stir
from torch import nn

import fullrank
from fullrank.edit import replace_weight
from fullrank.errors import RemedyError
from fullrank.remedies import Asked, remedy, repaired
from fullrank.remedies import patient as patient_module
from fullrank.remedies.applying import repair as repair_module
from fullrank.remedies.applying.answer import answer_of, same
from fullrank.remedies.applying.heard import unheard
from fullrank.remedies.applying.proof import proof_of
from untouched import changes, everything


def declared(name, make):
    """A remedy that puts `make(heads)` after every attention kernel."""

    def apply(patient):
        return patient.rewrite(name, after=lambda site: make(site.first.heads))

    words = {"addresses": ("redundant-heads",), "acts_on": "attention", "exactness": "identity-now"}
    return remedy(name, name, **words, formula="O", papers=("none",), cost="none")(apply)


def apply(case, *remedies):
    return repaired(case.model, lambda: case.model(**case.batch), [Asked(one, {}) for one in remedies])


class Parts(nn.Module):
    """One that is used as it is told, and one that is not used at all."""

    def __init__(self, heads, how):
        super().__init__()
        self.live = nn.Parameter(torch.zeros(heads, 1, 1))
        self.dead = nn.Parameter(torch.zeros(heads))
        self.how = how

    def forward(self, call, output):
        return self.how(output, self.live, self.dead)


class Detached(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError


HOW = {
    "plainly": lambda O, live, dead: O * (1 + live),  # noqa: E741
    "in steps, without a gradient": lambda O, live, dead: O * (1 + live.sign()),  # noqa: E741
    "beside a product with 0": lambda O, live, dead: O * (1 + live + 0 * dead.sum()),  # noqa: E741
}


@pytest.mark.parametrize("how", HOW)
def test_of_several_parameters_those_without_a_part_are_named(how):
    gc.collect()  # models of other tests that use the table of attention functions
    case = build("gpt2")
    state = everything(case.model)
    handle = apply(case, declared("head-gain", lambda heads: Parts(heads, HOW[how])))
    (one,) = handle.applied
    assert one.proof.acts
    assert list(one.proof.unheard) == [f"h.{layer}.attn.fullrank_head_gain_after.dead" for layer in range(3)]
    assert handle.notes == (
        "head-gain: the output does not depend on 3 added parameters: " + ", ".join(one.proof.unheard) + ".",
    )
    handle.undo()
    assert changes(state, everything(case.model)) == []


def test_one_that_another_hides_at_0_is_heard():
    case = build("gpt2")
    gated = declared("gated", lambda heads: Parts(heads, lambda O, live, dead: O + live * dead[:, None, None] * O))  # noqa: E741
    assert apply(case, gated).notes == ()


def test_none_that_has_a_part_is_refused():
    gc.collect()  # models of other tests that use the table of attention functions
    case = build("gpt2")
    state = everything(case.model)
    with pytest.raises(RemedyError, match="idle was put in place and the output does not depend on it: it was undone"):
        apply(case, declared("idle", lambda heads: Parts(heads, lambda O, live, dead: O)))  # noqa: E741
    assert changes(state, everything(case.model)) == []


def test_where_no_backward_is_possible_the_output_alone_decides_of_all_together():
    case = build("gpt2")
    kept = declared("kept", lambda heads: Parts(heads, lambda O, live, dead: Detached.apply(O * (1 + live))))  # noqa: E741
    (one,) = apply(case, kept).applied
    assert one.proof.acts
    assert one.proof.unheard == ()
    case = build("gpt2")
    with pytest.raises(RemedyError, match="the output does not depend on it"):
        apply(case, declared("idle", lambda heads: Parts(heads, lambda O, live, dead: Detached.apply(O))))  # noqa: E741


def test_half_precision_and_gradients_of_the_user_stay_out_of_it():
    case = build("gpt2")
    case.model.bfloat16()
    case.model.wte.weight.grad = torch.ones_like(case.model.wte.weight)
    case.model.h[1].requires_grad_(False)
    before = {name: p.requires_grad for name, p in case.model.named_parameters()}
    handle = apply(case, declared("head-gain", lambda heads: Parts(heads, HOW["plainly"])))
    assert len(handle.applied[0].proof.unheard) == 3
    assert {name: p.requires_grad for name, p in case.model.named_parameters() if name in before} == before
    assert torch.equal(case.model.wte.weight.grad, torch.ones_like(case.model.wte.weight))
    assert all(p.grad is None for name, p in case.model.named_parameters() if name != "wte.weight")


class Spoilt(nn.Module):
    """A model one of whose outputs is NaN for every token, as a broken row of a vocabulary makes it."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Linear(32, 5).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)))
            self.head.weight[2] = torch.nan

    def forward(self, input_ids):
        return self.head(self.body(input_ids)[0])


def spoilt():
    case = build("gpt2")
    return Spoilt(case.model).eval(), {"input_ids": case.batch["input_ids"]}


def test_nan_in_the_output_hides_no_movement_and_is_said():
    model, batch = spoilt()
    with torch.no_grad():
        before = model(**batch)
    with fullrank.repair(model, "center-attention", batch=batch) as handle:
        with torch.no_grad():
            moved = (model(**batch) - before)[..., [0, 1, 3, 4]]
        (one,) = handle.applied
        assert one.proof.largest == pytest.approx(float(moved.abs().max()), rel=1e-6)
        assert one.proof.acts
        assert one.proof.nans == int(before.isnan().sum()) == before.numel() // 5
        assert one.proof.turned == 0
        assert f"{one.proof.nans} entries are NaN" in str(one)
        assert f"{one.proof.nans} entries of the output are NaN" in handle.notes[0]


def test_nan_in_the_output_makes_nothing_heard_that_has_no_part():
    model, batch = spoilt()
    idle = declared("idle", lambda heads: Parts(heads, lambda O, live, dead: O))  # noqa: E741
    with pytest.raises(RemedyError, match="the output does not depend on it"):
        repaired(model, lambda: model(**batch), [Asked(idle, {})])
    live = declared("live", lambda heads: Parts(heads, HOW["plainly"]))
    assert repaired(model, lambda: model(**batch), [Asked(live, {})]).applied[0].proof.acts


def spoiling(value):
    """A remedy that writes a value into one number of a weight."""

    def apply(patient):
        def spoil(W):
            W[0, 0] = value
            return W

        return replace_weight(patient.model, "body.h.1.mlp.c_fc.weight", spoil)

    words = {"addresses": ("redundant-heads",), "acts_on": "weights", "exactness": "init-only"}
    return remedy("spoiling", "spoiling", **words, formula="W", papers=("none",), cost="none")(apply)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_make_finite_outputs_nan_are_taken_back(value):
    model, batch = spoilt()
    with torch.no_grad():
        before = model(**batch)
    state = everything(model.body)
    finite = int(before.isfinite().sum())
    with pytest.raises(
        RemedyError, match=f"with it {finite:,} entries of the output are NaN or infinite that were not"
    ):
        repaired(model, lambda: model(**batch), [Asked(spoiling(value), {})])
    assert [what for what in changes(state, everything(model.body)) if what != "versions"] == []
    repaired(model, lambda: model(**batch), [Asked(spoiling(0.5), {})]).undo()


@pytest.mark.parametrize(
    ("before", "after", "largest", "turned", "nans", "acts"),
    [
        ([1.0, torch.nan], [1.0, torch.nan], 0.0, 0, 1, False),
        ([1.0, torch.nan], [1.0, 2.0], 0.0, 1, 0, True),
        ([1.0, 2.0], [1.5, torch.nan], 0.5, 1, 1, True),
        ([1.0, -torch.inf], [1.0, -torch.inf], 0.0, 0, 0, False),
        ([1.0, torch.inf], [1.0, -torch.inf], 0.0, 1, 0, True),
        ([torch.nan, torch.nan], [torch.nan, torch.nan], 0.0, 0, 2, False),
        ([torch.nan], [torch.inf], 0.0, 1, 0, True),
        ([], [], 0.0, 0, 0, False),
        ([1.0], [1.0, 2.0], float("inf"), 0, 0, True),
    ],
)
def test_what_is_compared_is_finite_in_both_and_another_pattern_is_a_movement(
    before, after, largest, turned, nans, acts
):
    now = torch.tensor(after)
    proof, found = proof_of(nn.Identity(), lambda: now, torch.tensor(before), {}, acts=False)
    assert (proof.largest, proof.turned, proof.nans, proof.acts) == (largest, turned, nans, acts)
    assert same(found, now)
    assert str(proof)


def test_it_leaves_random_numbers_and_values_as_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.ones(2, 3)
    state, random = everything(model), torch.get_rng_state()
    added = {"0.weight": model[0].weight, "free": nn.Parameter(torch.ones(2))}
    after = answer_of(model, lambda: model(x))
    assert unheard(model, lambda: model(x), after, added) == ["free"]
    assert [what for what in changes(state, everything(model)) if what != "versions"] == []
    assert torch.equal(torch.get_rng_state(), random)


# ---------------------------------------------------------------- several remedies


def counted(monkeypatch, module, name):
    calls = []
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or inner(*args))
    return calls


SEVERAL = ["scaled-init", "attn-scale", "small-init", "center-attention", "layer-scale"]


def test_sums_over_all_weights_are_taken_once_for_each_remedy_and_once_before(monkeypatch):
    case = build("gpt2")
    sums = counted(monkeypatch, repair_module, "checksums")
    with fullrank.repair(case.model, SEVERAL, batch=case.batch):
        assert len(sums) == len(SEVERAL) + 1


def test_what_the_last_one_has_answered_is_where_the_next_one_begins(monkeypatch):
    case = build("gpt2")
    answers = counted(monkeypatch, repair_module, "answer_of")
    with torch.no_grad():
        base = case()
    with fullrank.repair(case.model, SEVERAL, batch=case.batch) as handle:
        assert len(answers) == 1
        together = [one.proof for one in handle.applied]
    for number, name in enumerate(SEVERAL):
        if number:
            outer = fullrank.repair(case.model, SEVERAL[:number], batch=case.batch)
        with fullrank.repair(case.model, name, batch=case.batch) as alone:
            assert alone.applied[0].proof == together[number]
        if number:
            outer.undo()
    with torch.no_grad():
        assert torch.equal(case(), base)


def test_the_model_is_looked_at_again_only_where_more_than_values_of_weights_was_changed(monkeypatch):
    found = {}
    for names in (["scaled-init"], ["scaled-init", "small-init"], ["attn-scale", "scaled-init", "small-init"]):
        case = build("gpt2")
        looks = counted(monkeypatch, patient_module, "survey")
        with fullrank.repair(case.model, names, batch=case.batch):
            found[len(names)] = len(looks)
            weights = {name: p.detach().clone() for name, p in case.model.named_parameters()}
        monkeypatch.undo()
        for name in names[::-1]:  # one by one they give the same
            fullrank.repair(case.model, names[names[::-1].index(name)], batch=case.batch)
        assert all(torch.equal(p, weights[name]) for name, p in case.model.named_parameters())
    assert found == {1: 1, 2: 1, 3: 2}


def test_stirring_is_no_part_of_what_is_kept():
    case = build("gpt2")
    with fullrank.repair(case.model, ["attn-scale", "layer-scale"], batch=case.batch) as handle:
        assert not handle.trained
        stir([p for name, p in case.model.named_parameters() if "fullrank" in name])
        assert not handle.trained
