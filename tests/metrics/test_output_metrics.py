"""The loss of tokens is its definition written with loops, and what torch gives."""

import math

import pytest
import torch

from fullrank import metrics
from fullrank.metrics import outputs
from oracles.outputs import token_loss


def drawn(generator, dtype=torch.float64, size=1.0):
    logits = (size * torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(11, (3, 7), generator=generator)
    targets[1, 2:] = -100
    targets[2] = -100
    mask = torch.rand(3, 7, generator=generator) > 0.3
    mask[0, 0] = mask[1, 0] = True
    return logits, targets, mask


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_tokens_equals_its_definition(dtype, size, generator):
    logits, targets, mask = drawn(generator, dtype, size)
    found = metrics.token_loss(logits, targets, mask)
    expected = [token_loss(z, y, m) for z, y, m in zip(logits.double(), targets, mask, strict=True)]
    assert found[:2].tolist() == pytest.approx(expected[:2], rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert math.isnan(found[2])
    assert math.isnan(expected[2])


def test_its_mean_over_tokens_is_the_cross_entropy_of_torch(generator):
    logits, targets, _ = drawn(generator)
    losses = metrics.token_losses(logits, targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert float(losses.nanmean()) == pytest.approx(float(expected), rel=1e-12)


def test_equally_likely_words_cost_the_log_of_their_number():
    found = metrics.token_loss(torch.full((2, 5, 64), 3.0), torch.arange(10).reshape(2, 5))
    assert found.tolist() == pytest.approx([math.log(64)] * 2)


def test_many_tokens_are_made_float32_piece_by_piece(generator, monkeypatch):
    logits, targets, mask = drawn(generator)
    whole = metrics.token_loss(logits, targets, mask)
    monkeypatch.setattr(outputs, "_ENTRIES", 40)
    torch.testing.assert_close(metrics.token_loss(logits, targets, mask), whole, equal_nan=True)
