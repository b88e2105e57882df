"""A learned sink against its definition, and what it takes."""

import pytest
import torch
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import normal, shown

import fullrank
from fullrank.errors import EditError
from fullrank.remedies.attention.learned_sink import LearnedSink


@pytest.mark.parametrize("start", [None, 0.5])
@pytest.mark.parametrize("mask", MASKS)
def test_a_key_of_each_head_takes_attention_and_returns_nothing(mask, start):
    case = MASKS[mask]()
    with repaired_and_seen(case, "learned-sink", start=start) as (_, calls):
        modules = [m for m in case.model.modules() if isinstance(m, LearnedSink)]
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(modules)
        for call, module in zip(seen, modules, strict=True):
            sigma = module.per_head.detach()[None, :, None, None].expand(*call.s.shape[:-1], 1)
            expected = dense_softmax(torch.cat([call.s, sigma], -1))[..., :-1] @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("mask", ["causal", "padded", "biased"])
def test_it_starts_below_everything(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "learned-sink", stirred=False) as (_, calls):
        modules = [m for m in case.model.modules() if isinstance(m, LearnedSink)]
        for call, module in zip([c for c in calls() if c.part == "self"], modules, strict=True):
            taken = torch.exp(module.per_head.detach()[:, None] - call.s.logsumexp(-1))
            taken = taken[call.visible.any(-1)]
            assert float(taken.max()) == pytest.approx(torch.e**-16, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 2}])
def test_widths_that_are_no_multiple_of_eight_and_shared_key_heads(options):
    module = LearnedSink(4, 0.3).double().requires_grad_(False)
    module.per_head.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    Q, K, V = normal(2, 4, 5, 6), normal(2, 2, 5, 6, seed=1), normal(2, 2, 5, 6, seed=2)
    call = module(shown(Q, K, V, **options))
    s = Q @ K.repeat_interleave(2, 1).mT / 6**0.5
    band = torch.ones(5, 5, dtype=torch.bool)
    if options:
        band = band.tril().triu(1 - options.get("window", 5))
    s = s.masked_fill(~band, float("-inf"))
    s = torch.cat([s, module.per_head[:, None, None].expand(2, 4, 5, 1)], -1)
    expected = torch.softmax(s, -1)[..., :-1] @ V.repeat_interleave(2, 1)
    torch.testing.assert_close(call.product(), expected, rtol=0, atol=1e-12)


def test_for_queries_without_a_match_the_sink_takes_what_the_first_token_took():
    """Scores N(0, 1) of 63 keys beside a first token at 5; a sink at 8 leaves it with a small share of what it had."""
    Q, K = torch.zeros(1, 1, 64, 2).double(), torch.zeros(1, 1, 64, 2).double()
    Q[..., 0], K[..., 0] = 1.0, normal(1, 1, 64)
    K[:, :, 0, 0] = 5.0
    taken = {}
    for start in (-30.0, 0.0, 8.0):
        module = LearnedSink(1, start).double().requires_grad_(False)
        A = module(shown(Q, K, torch.eye(64).double()[None, None], scale=1.0)).product()
        taken[start] = float(A[..., 0].mean()), float(A.sum(-1).mean())
    assert taken[-30.0][0] > 0.5
    assert taken[-30.0][1] == pytest.approx(1.0)
    assert taken[0.0][1] < 1 - 1e-3
    assert taken[8.0][0] < 0.06
    assert taken[8.0][1] < 0.1


def test_sinks_that_a_kernel_has_are_not_lost_silently():
    call = shown(normal(1, 1, 3, 8), normal(1, 1, 3, 8), sink=torch.zeros(1))
    with pytest.raises(EditError, match="sinks of its own"):
        LearnedSink(1, 0.0)(call)


def test_it_is_a_parameter_of_every_head():
    case = MASKS["causal"]()
    with fullrank.repair(case.model, "learned-sink", batch=case.batch) as repair:
        assert repair.parameters == 3 * 4
