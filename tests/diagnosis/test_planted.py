"""Faults planted in models are what they are said to be, and verdicts name them where they are.

All cases of both halves: `benchmarks/planted.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

import fullrank
from planted import faults
from planted.cases import FAILURE_OF, HALVES, Case, Outcome, cases, clean, examined, planted
from planted.table import confusion, scores
from planted.trained import ARCHITECTURES, BEGIN, HEADS, WIDTH, fresh, held_out_digits, held_out_windows, one_thread

NAMES = list(ARCHITECTURES)
PRE_NORM = [name for name, made in ARCHITECTURES.items() if made.pre_norm]


def given(name):
    """A fresh model whose matrices are as large as trained ones, and a batch."""
    model = fresh(name, 0, layers=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model, ARCHITECTURES[name].held_out("development", 0)


def written(model, layer, batch):
    """What heads hand to W_O, (…, heads, size)."""
    seen = []
    weight = faults.limbs(model, layer)["o"].weight
    module = next(one for one in model.modules() if _holds(one, weight))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].unflatten(-1, (faults.heads_of(model), -1))


def _holds(module, weight):
    own = getattr(module, "weight", None)
    return own is not None and own.data_ptr() == weight.data_ptr()


# ------------------------------------------------------------ faults


@pytest.mark.parametrize("name", NAMES)
def test_limbs_are_the_model_own_weights(name):
    model, batch = given(name)
    before = faults.states(model, batch)
    with torch.no_grad():
        limbs = faults.limbs(model, 2)
        shapes = {role: tuple(limb.weight.shape) for role, limb in limbs.items()}
        for limb in limbs.values():
            for tensor in limb.tensors:
                tensor.mul_(1.5)
    after = faults.states(model, batch)
    assert shapes["q"] == shapes["o"] == (WIDTH, WIDTH)
    assert shapes["k"] == shapes["v"] and shapes["down"][0] == WIDTH
    assert all(torch.equal(x, y) for x, y in zip(before[:2], after[:2], strict=True))
    assert not torch.allclose(before[2], after[2], rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_copy_of_a_head_writes_what_the_head_writes_and_others_what_they_wrote(name):
    model, batch = given(name)
    before = written(model, 1, batch)
    with torch.no_grad():
        faults.duplicated_heads(model, 1, (0, 1), scale=2.0)
    after = written(model, 1, batch)
    assert_close(after[..., 1, :], before[..., 0, :])
    assert_close(after[..., [0, 2, 3], :], before[..., [0, 2, 3], :])
    columns = faults.limbs(model, 1)["o"].weight.unflatten(1, (HEADS, -1))
    assert_close(columns[:, 1], 2 * columns[:, 0])


def test_blocks_without_branches_hand_on_what_they_were_given():
    for name in PRE_NORM:
        model, batch = given(name)
        with torch.no_grad():
            faults.identities(model, (2,))
        _, first, second, third = faults.states(model, batch)
        assert_close(first, second, rtol=0, atol=1e-5)
        assert not torch.allclose(second, third, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_drawn_together_keep_a_share_of_their_differences_and_see_nothing_ahead(name):
    model, batch = given(name)
    before = faults.states(model, batch)
    with torch.no_grad():
        faults.drawn_together(model, 2, contrast=0.01)
    after = faults.states(model, batch)
    assert torch.equal(before[1], after[1])
    centre = (lambda X: X[:, :1]) if ARCHITECTURES[name].causal else (lambda X: X.mean(1, keepdim=True))
    assert_close(after[2] - centre(after[2]), 0.01 * (before[2] - centre(before[2])), rtol=0, atol=1e-5)
    if ARCHITECTURES[name].causal:
        other = batch["input_ids"].clone()
        other[:, -1] = 5
        cut = faults.states(model, {"input_ids": other})
        assert torch.equal(cut[3][:, :-1], after[3][:, :-1])


def test_a_shared_direction_leaves_the_tokens_their_differences_and_hides_them():
    model, batch = given("vit")
    before = faults.states(model, batch)[2]
    with torch.no_grad():
        faults.shared_direction(model, 2, batch, contrast=0.001)
    after = faults.states(model, batch)[2]
    assert_close(after - after.mean(1, keepdim=True), before - before.mean(1, keepdim=True), rtol=0, atol=1e-3)
    assert faults.token_share(after) == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_stream_near_overflow_has_the_largest_entry_that_was_asked_for_and_is_finite(name):
    model, batch = given(name)
    with torch.no_grad():
        faults.near_overflow(model, 2, batch, share=0.5)
        half = {key: value.half() if value.is_floating_point() else value for key, value in batch.items()}
        assert bool(torch.as_tensor(model(**half)["loss"]).isfinite())
    found = faults.states(model, half)
    assert float(found[2].abs().max()) == pytest.approx(0.5 * 65504, rel=0.02)
    assert float(found[1].abs().max()) < 100


def test_heads_rest_on_the_first_position_whatever_token_is_there():
    model, batch = given("gpt2")
    with torch.no_grad():
        faults.first_token_as_sink(model, {2: (0, 3)}, batch)
    model.set_attn_implementation("eager")
    _, cut = faults.without_beginning(model, batch)
    assert bool((batch["input_ids"][:, 0] == BEGIN).all()) and not bool((cut["input_ids"] == BEGIN).any())
    for given_batch in (batch, cut):
        with torch.no_grad():
            maps = model(**given_batch, output_attentions=True).attentions[1]
        mass = maps[:, :, 8:, 0].mean((0, 2))
        assert bool((mass[[0, 3]] > 0.5).all()), mass


def test_a_sink_on_content_is_a_warning_and_one_on_the_beginning_is_not():
    model, batch = given("gpt2")
    with torch.no_grad():
        faults.first_token_as_sink(model, {2: (0, 3), 3: (1,)}, batch)
    subject, cut = faults.without_beginning(model, batch)
    for batch_of, severity in ((cut, "warn"), (batch, "note")):
        found = fullrank.examine(subject, batch_of, spectrum=False, verify=True).diagnosis
        (sinks,) = [one for one in found.verdicts if one.name == "sinks"]
        assert (str(sinks.severity), sinks.layers) == (severity, (2, 3))


def test_without_skips_tokens_merge_and_with_them_they_do_not():
    batch = ARCHITECTURES["post-norm encoder"].held_out("development", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        without, whole = (faults.WeakClassifier(8, skip, WIDTH, HEADS).eval() for skip in (0.0, 1.0))
    assert faults.merged(without, batch)[-1] == 8
    assert faults.merged(whole, batch) == []


def test_queries_that_were_never_trained_are_those_of_a_fresh_model():
    model, twin = fresh("llama", 0), fresh("llama", 7)
    before = {role: limb.weight.clone() for role, limb in faults.limbs(model, 3).items()}
    with torch.no_grad():
        faults.undrawn_queries(model, (3,), twin)
    after = faults.limbs(model, 3)
    assert all(torch.equal(after[role].weight, faults.limbs(twin, 3)[role].weight) for role in "qk")
    assert all(torch.equal(after[role].weight, before[role]) for role in ("v", "o", "down"))


# ------------------------------------------------------------ cases and counts


def test_halves_share_no_document_no_trained_model_and_no_case():
    for draw in (held_out_windows, held_out_digits):
        drawn = [{tuple(one.flatten().tolist()) for one in draw(half, 10_000, 0)[0]} for half in HALVES]
        assert all(drawn) and not any(one & other for one, other in itertools.combinations(drawn, 2))
    made = [{(one.architecture, one.seed) for one in cases(half) if not one.fresh} for half in HALVES]
    assert not any(one & other for one, other in itertools.combinations(made, 2))


def test_each_half_has_fifty_planted_and_fifty_clean_cases_and_every_fault():
    for half in HALVES:
        assert len(planted(half)) >= 50 and len(clean(half)) >= 50
        assert {one.fault for one in planted(half)} == set(FAILURE_OF)


def outcome(fault, layers, *said):
    return Outcome(Case(HALVES[0], "gpt2", 0, 0, fault, layers), layers, said)


def test_a_name_at_other_layers_is_both_missed_and_false():
    found = [
        outcome("identities", (2,), ("dead-depth", "warn", (2,))),
        outcome("identities", (3,), ("dead-depth", "fail", (2, 3))),
        outcome("identities", (4,), ("dead-depth", "note", (4,))),
        outcome("drawn_together", (3,), ("rank-collapse-depth", "fail", (3, 4)), ("dead-depth", "warn", (4,))),
        outcome("drawn_together", (2,), ("rank-collapse-depth", "fail", (3, 4))),
        outcome("", (), ("dead-depth", "warn", (1,))),
    ]
    by_name = {one.failure: one for one in scores(found)}
    dead, merged = by_name["dead-depth"], by_name["rank-collapse-depth"]
    assert (dead.planted, dead.named, dead.false) == (3, 1, 2)
    assert dead.recall == pytest.approx(1 / 3) and dead.precision == pytest.approx(1 / 3)
    assert (merged.planted, merged.named, merged.false) == (2, 1, 1)
    assert (by_name["all"].planted, by_name["all"].named, by_name["all"].false) == (5, 2, 3)
    _, shown = confusion(found)
    assert shown["identities"]["dead-depth"] == "2" and shown["identities"]["nothing"] == "1"
    assert shown["drawn_together"]["dead-depth"] == "1*" and shown["clean"]["dead-depth"] == "1"


def test_a_clean_case_may_have_one_warning_and_no_failure():
    assert outcome("", (), ("dead-depth", "warn", (1,))).right
    assert not outcome("", (), ("dead-depth", "warn", (1,)), ("sinks", "warn", (1,))).right
    assert not outcome("", (), ("dead-depth", "fail", (1,))).right


# ------------------------------------------------------------ end to end


def _selected():
    """Twelve cases of three models that are trained within seconds, with every fault that they can have."""
    wanted = {"bert", "pre-norm encoder", "post-norm encoder"}
    mine = [one for one in planted("development") if one.architecture in wanted and one.fault != "frozen_queries"]
    first = {(one.fault, one.architecture): one for one in reversed(mine)}
    chosen = list({fault: one for (fault, _), one in first.items()}.values())
    again = [one for one in mine if one.fault in ("drawn_together", "frozen_softmax") and one not in chosen]
    healthy = {one.architecture: one for one in clean("development") if one.architecture in wanted and not one.fresh}
    return [*chosen, *again[: 12 - len(chosen) - len(healthy)], *healthy.values()]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.mark.slow
@pytest.mark.parametrize("case", _selected(), ids=lambda case: case.words)
def test_a_planted_fault_is_named_where_it_is_and_nothing_else_is_said(case, kept):
    with one_thread():
        found = examined(case, kept)
    assert found.right, found.verdicts
    assert found.false == []
