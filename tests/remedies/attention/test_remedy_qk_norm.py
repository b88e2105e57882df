"""QK-norm against its definition, the gain that keeps the spread, and what it bounds."""

import math

import pytest
import torch
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import normal, shown

import fullrank
from fullrank.remedies.attention.qk_norm import QKNorm
from golden import assert_golden

FUSED = [mask for mask in MASKS if "explicit" not in mask]


def _modules(case):
    return [m for n, m in case.model.named_modules() if n.endswith("fullrank_qk_norm_before")]


def _new_scores(call, norm, gain):
    size = (
        (lambda x: x.square().mean(-1, keepdim=True)) if norm == "rms" else (lambda x: x.square().sum(-1, keepdim=True))
    )
    q, k = (x / (size(x) + 1e-6).sqrt() for x in (call.q, call.k))
    scale = call.q.shape[-1] ** -0.5 if norm == "rms" else 1.0
    return call.s - call.scale * call.q @ call.k.mT + gain[:, None, None] * scale * q @ k.mT


@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("mask", FUSED)
def test_queries_and_keys_are_normalised_by_head(mask, norm):
    case = MASKS[mask]()
    with repaired_and_seen(case, "qk-norm", norm=norm) as (_, calls):
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(_modules(case))
        for call, module in zip(seen, _modules(case), strict=True):
            expected = dense_softmax(_new_scores(call, norm, module.per_head.detach())) @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("mask", ["causal", "padded", "causal window"])
def test_the_gain_keeps_the_spread_of_the_scores(mask, norm):
    case = MASKS[mask]()
    with repaired_and_seen(case, "qk-norm", stirred=False, norm=norm) as (_, calls):
        for call, module in zip([c for c in calls() if c.part == "self"], _modules(case), strict=True):
            new = _new_scores(call, norm, module.per_head.detach())
            torch.testing.assert_close(_spread(new, call.visible), _spread(call.s, call.visible), rtol=1e-6, atol=0)


def _spread(s, visible):
    found = []
    for h in range(s.shape[1]):
        rows = [s[b, h, t][visible[b, h, t]] for b in range(s.shape[0]) for t in range(s.shape[2])]
        found.append(torch.stack([row.var(correction=0) for row in rows if len(row) > 1]).mean().sqrt())
    return torch.stack(found)


def test_golden_entropy_does_not_depend_on_the_size_of_queries_and_keys():
    module = QKNorm(1, "rms").double().requires_grad_(False)
    module.per_head.fill_(1.0)
    found = []
    for size in (1, 4, 16):
        call = module(shown(size * normal(8, 1, 128, 64), size * normal(8, 1, 128, 64, seed=1)))
        A = torch.softmax(call.scale * call.query @ call.key.mT, -1)
        found.append(float(-torch.special.xlogy(A, A).sum(-1).mean()))
    assert_golden("of-qknorm-entropy", found)


@pytest.mark.parametrize(("norm", "bound"), [("rms", math.sqrt(8)), ("l2", 10.0)])
def test_for_weights_that_grow_scores_stay_within_their_bound(norm, bound):
    case = MASKS["causal"]()
    with torch.no_grad():
        for n, p in case.model.named_parameters():
            if "q_proj" in n or "k_proj" in n:
                p.mul_(30)
    with repaired_and_seen(case, "qk-norm", stirred=False, norm=norm, start="usual") as (_, calls):
        for call, module in zip(calls(), _modules(case), strict=True):
            assert float(call.s[call.visible].abs().max()) > 100
            new = _new_scores(call, norm, module.per_head.detach())
            assert float(new[call.visible].abs().max()) <= bound + 1e-9


def test_models_that_softmax_by_themselves_are_refused_and_left_alone():
    case = MASKS["causal and padded, explicit softmax"]()
    names = list(case.model.state_dict())
    with pytest.raises(fullrank.errors.RemedyError, match="shows no queries and keys"):
        fullrank.repair(case.model, "qk-norm", batch=case.batch)
    assert list(case.model.state_dict()) == names
