"""Softpick against its definition and its golden numbers."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from calls import normal, shown

from fullrank.remedies.attention.softpick import Softpick, softpicked
from golden import assert_golden


def _by_definition(s, visible):
    e = torch.where(visible, torch.exp(torch.where(visible, s, 0.0)) - 1, 0.0)
    return torch.relu(e) / (e.abs().sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_the_map_is_rectified(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "softpick") as (_, calls):
        for call in [call for call in calls() if call.part == "self"]:
            expected = _by_definition(call.s, call.visible) @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


def test_golden_rows_of_zeros_give_nothing_and_random_ones_less_than_one():
    assert_golden("of-softpick-null", float(softpicked(torch.zeros(64).double()).sum()))
    assert_golden("of-softpick-row-sum", float(softpicked(normal(2000, 64)).sum(-1).median()))


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_large_scores_do_not_overflow_and_have_gradients(size):
    s = (size * normal(5, 9).float()).requires_grad_()
    softpicked(s).square().sum().backward()
    assert torch.isfinite(s.grad).all()
    torch.testing.assert_close(softpicked(-s.detach().abs()), torch.zeros(5, 9))


def test_for_queries_that_have_nothing_to_look_for_no_key_takes_their_attention():
    """A query whose scores are all negative returns nothing, where softmax must give its weight to some key."""
    K = torch.nn.functional.normalize(normal(1, 1, 16, 8), dim=-1)
    K = K * K[..., :1].sign()  # all in one half-space
    away = -torch.nn.functional.one_hot(torch.tensor([0]), 8).double()[None, None]
    V = normal(1, 1, 16, 8, seed=1)
    call = shown(away, K, V)
    assert float(Softpick(1e-6)(call).product().abs().max()) == 0
    assert float((torch.softmax(away @ K.mT, -1) @ V).norm()) > 0.1
    assert float(Softpick(1e-6)(shown(-away, K, V)).product().norm()) > 0.1
