"""The lambda-skip's condition and its practical law against layers that are really run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden

from fullrank.theory.lambda_skip import (
    deviation_ratio,
    smallest_strength,
    spread_share,
    start_needed,
    strength_threshold,
    vacuous,
)


def run(strength, count, width, depth, generator, *, value="identity", spread=1.0):
    """μ²/‖Y‖² before and after `depth` layers Y ← rowL2(M Y C + λY), M a fresh softmax of Gaussian logits."""
    y = torch.randn(count, width, generator=generator, dtype=torch.float64)
    y = y / y.norm(dim=1, keepdim=True)
    shares = [share(y)]
    for _ in range(depth):
        mixing = (spread * torch.randn(count, count, generator=generator, dtype=torch.float64)).softmax(1)
        drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
        made = {"identity": torch.eye(width, dtype=torch.float64), "gaussian": drawn / math.sqrt(width)}
        if value == "orthogonal":
            made[value] = torch.linalg.qr(drawn)[0]
        y = mixing @ y @ made[value] + strength * y
        y = y / y.norm(dim=1, keepdim=True)
        shares.append(share(y))
    return shares


def share(y):
    return float((y - y.mean(0)).square().sum() / y.square().sum())


# ------------------------------------------------------------ the sufficient condition


def test_the_condition_meets_its_golden_numbers():
    assert_golden("ls-threshold", float(strength_threshold(0.9999, value_norm=1.0, mixing_norm=math.sqrt(128))))
    assert_golden("ls-remark", 0.9999**64)
    found = [
        smallest_strength(0.9999, tokens=128, width=64, depth=64),
        smallest_strength(0.9, tokens=32, width=32, depth=6),
    ]
    assert_golden("ls-threshold-with-b", found)


@pytest.mark.parametrize("share_kept", [0.3, 0.9])
def test_the_threshold_is_where_the_inequality_turns(share_kept):
    limit = float(strength_threshold(share_kept, value_norm=2.0, mixing_norm=3.0))
    for strength, holds in ((1.001 * limit, True), (0.999 * limit, False), (-1.001 * limit, True)):
        assert (strength**2 > share_kept * (6.0 + abs(strength)) ** 2) == holds
        sizes = {"tokens": 8, "width": 4, "depth": 3, "value_norm": 2.0, "mixing_norm": 3.0}
        assert math.isfinite(float(start_needed(strength, share_kept, **sizes))) == holds


@pytest.mark.parametrize(("count", "width"), [(8, 8), (16, 12)])
def test_where_the_theorem_speaks_the_spread_is_kept(count, width):
    a, depth = 0.5, 2
    norm = math.sqrt(width)  # of C_V = I
    strength = smallest_strength(a, tokens=count, width=width, depth=depth, value_norm=norm)
    generator = torch.Generator().manual_seed(0)
    shares = run(strength, count, width, depth, generator)
    assert shares[-1] >= a**depth * shares[0]
    assert vacuous(strength, a, tokens=count, value_norm=norm) == ""
    assert "it says nothing here" in vacuous(2.0, a, tokens=count, value_norm=norm)


# ------------------------------------------------------------ the practical law

GENERATORS = range(3)


def last(strength, **options):
    """Geometric mean over draws of what is left after 64 layers of 32 tokens."""
    found = [run(strength, 32, 32, 64, torch.Generator().manual_seed(seed), **options)[-1] for seed in GENERATORS]
    return math.exp(np.mean(np.log(np.maximum(found, 1e-300))))


def test_the_law_meets_its_golden_numbers():
    assert_golden("ls-law-collapsed", [last(0.0), last(1.0)])
    assert_golden("ls-law-slow", last(5.0))
    assert_golden("ls-law-negative", [last(-1.0), last(-2.0)])
    assert_golden("ls-orthogonal-value", last(5.0, value="orthogonal"))
    assert_golden("ls-gaussian-value", last(5.0, value="gaussian"))


@pytest.mark.parametrize(("count", "strength"), [(64, 3.0), (128, 6.0), (64, -0.3), (64, -3.0)])
def test_nearly_uniform_layers_follow_the_law(count, strength):
    generator = torch.Generator().manual_seed(1)
    shares = run(strength, count, 16, 8, generator, spread=0.01)
    expected = [float(spread_share(strength, k, start=shares[0])) for k in range(9)]
    # a layer's norm brings rows of other lengths to one: 10 % of the odds in the first layers
    odds = [np.log(s / (1 - s)) for s in np.clip(shares, 1e-200, 1 - 1e-16)]
    law = [np.log(s / (1 - s)) for s in np.clip(expected, 1e-200, 1 - 1e-16)]
    assert np.diff(odds)[2:] == pytest.approx(np.diff(law)[2:], rel=0.1, abs=0.02)


def test_collapse_turns_to_growth_at_minus_one_half():
    assert float(deviation_ratio(-0.5)) == 1.0
    strengths = np.array([-3.0, -1.0, -0.51, -0.49, 0.0, 1.0, 5.0])
    assert (deviation_ratio(strengths) > 1).tolist() == [True, True, True, False, False, False, False]
    assert math.isinf(float(deviation_ratio(-1.0)))
    assert spread_share(strengths, 10**6).tolist() == pytest.approx([1, 1, 1, 0, 0, 0, 0])
    assert spread_share(5.0, 64) == pytest.approx((5 / 6) ** 128, rel=1e-6)
