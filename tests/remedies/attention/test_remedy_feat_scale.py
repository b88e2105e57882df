"""FeatScale against its definition, U as a dense matrix, on what the branch adds to the stream."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen
from attention_only import AttentionOnly, residual

import fullrank
from fullrank.capture import survey, undisturbed
from fullrank.edit import find_branches, scale_branch
from fullrank.errors import RemedyError

BRANCHES = [name for name in MASKS if name != "causal, explicit softmax"]
"""Plain code whose attention is a function: no module returns what is added."""


@pytest.mark.parametrize("mask", MASKS)
def test_mean_and_rest_of_the_branch_have_gains(mask):
    case = MASKS[mask]()
    with undisturbed(case.model), torch.no_grad():
        anatomy = survey(case.model, case)
        branches = find_branches(case.model, case, anatomy)
    with repaired_and_seen(case, "feat-scale") as (_, calls):
        seen = [call for call in calls() if call.part == "self"]
        with torch.no_grad():
            found = case()
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_feat_scale")]
        assert len(modules) == len(seen)
        gains = [(m.s.detach().clone(), m.t.detach().clone()) for m in modules]
    edits = [
        scale_branch(
            case.model, branches, by=scaled(call.U[:, 0], *gain), stack=call.stack, layer=call.layer, branch="attention"
        )
        for call, gain in zip(seen, gains, strict=True)
    ]
    with torch.no_grad():
        expected = case()
    for edit in edits:
        edit.undo()
    rows = real_rows(case, seen[-1])[:, 0]
    if found.shape[:2] != rows.shape:  # an image's or a decoder's own end
        rows = torch.ones(found.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-4 if "explicit" in mask else 1e-9)


def scaled(U, s, t):
    return lambda F: F + s * (U @ F) + t * (F - U @ F)


def test_no_later_token_is_seen_where_attention_is_causal():
    case = MASKS["causal"]()
    with fullrank.repair(case.model, "feat-scale?low=-0.5&high=1", batch=case.batch), torch.no_grad():
        before = case()
        case.batch["input_ids"] = case.batch["input_ids"].clone()
        case.batch["input_ids"][:, 5:] = (case.batch["input_ids"][:, 5:] + 1) % 50
        torch.testing.assert_close(case()[:, :5], before[:, :5], rtol=0, atol=1e-12)


def test_a_cache_hides_what_is_averaged_over_and_is_refused():
    case = MASKS["causal"]()
    with fullrank.repair(case.model, "feat-scale", batch=case.batch), torch.no_grad():
        past = case.model(case.batch["input_ids"][:, :5], use_cache=True).past_key_values
        with pytest.raises(RemedyError, match="run without a key-value cache"):
            case.model(case.batch["input_ids"][:, 5:6], past_key_values=past)


def test_weaker_means_and_stronger_rests_delay_the_collapse_of_a_stack():
    found = []
    for remedy in (None, "feat-scale?low=-1&high=1"):
        model = SkipStack()
        if remedy is None:
            found.append(residual(model.states()[-1]))
            continue
        with fullrank.repair(model, remedy, batch={"X": model.start}):
            found.append(residual(model.states()[-1]))
    plain, scaled_rest = found
    assert plain < 0.7
    assert scaled_rest > 0.95


def SkipStack():
    return AttentionOnly(tokens=64, width=64, heads=4, layers=12, seed=0, skip=1.0)
