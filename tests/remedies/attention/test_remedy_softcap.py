"""Softcap against its definition, by blocks and at once, and what it bounds."""

import pytest
import torch
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import normal, shown

from fullrank.remedies.attention import scores as scores_module
from fullrank.remedies.attention.softcap import Softcap


@pytest.mark.parametrize("cap", [0.4, 50.0])
@pytest.mark.parametrize("mask", MASKS)
def test_scores_are_bent_before_biases_and_masks(mask, cap):
    case = MASKS[mask]()
    with repaired_and_seen(case, "softcap", cap=cap) as (_, calls):
        for call in [call for call in calls() if call.part == "self"]:
            product = call.s if call.q is None else call.scale * call.q @ call.k.mT
            bent = cap * torch.tanh(product / cap)
            s = bent if call.q is None else call.s - product + bent
            expected = dense_softmax(s.masked_fill(~call.visible, float("-inf"))) @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 3}, {"mask": "float"}])
def test_blocks_give_the_output_and_the_gradients_of_the_whole(monkeypatch, options):
    """A float mask that broadcasts over queries, causality and a window; two query heads share a key head."""
    if options:
        options = {n: v if v != "float" else normal(2, 1, 1, 7) for n, v in options.items()}
    found = []
    for entries in (1 << 25, 60):
        monkeypatch.setattr(scores_module, "row_blocks", lambda call, e=entries: _blocks(call, e))
        tensors = [normal(2, h, 7, 4, seed=s).requires_grad_() for s, h in ((0, 4), (1, 2), (2, 2))]
        call = Softcap(0.5)(shown(*tensors, **options))
        output = call.product()
        output.square().sum().backward()
        found.append([output.detach(), *(one.grad for one in tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


_blocks = scores_module.row_blocks


def test_for_scores_that_explode_the_map_keeps_more_than_one_key():
    """Scores of size 1000: no head of c = 5 gives a key more than e^{2c} times what another gets."""
    call = shown(
        100 * normal(1, 2, 32, 16), 100 * normal(1, 2, 32, 16, seed=1), torch.eye(32).double().expand(1, 2, 32, 32)
    )
    plain = torch.softmax(call.query @ call.key.mT / 4, -1)
    capped = Softcap(5.0)(call).product()
    assert float(plain.amax(-1).median()) == 1.0
    assert float((capped.amax(-1) / capped.amin(-1)).max()) <= torch.e**10 * (1 + 1e-9)
    assert float(capped.amax(-1).max()) < 0.5
