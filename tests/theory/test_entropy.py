"""Floors and ceilings of attention entropy against minimisation and counting; carried scores against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from tests.golden import assert_golden

from fullrank.architecture import Architecture
from fullrank.theory.entropy import (
    causal_ceiling,
    entropy_floor,
    mean_reduced_weight,
    norm_for_entropy,
    row_logit_norm,
)
from fullrank.theory.hopfield_attention import carried_spread, stationary_spread


def entropy(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1)


# ------------------------------------------------------------ floors


def test_the_floor_meets_its_golden_numbers():
    keys = np.array([4, 4, 4, 16, 16, 16, 128, 128, 128, 128])
    norms = np.array([0.5, 2, 6, 0.5, 2, 6, 0.5, 2, 6, 12])
    assert_golden("en-floor-formula", entropy_floor(norms, keys=keys))


@pytest.mark.parametrize(("keys", "norm"), [(4, 0.5), (4, 6.0), (16, 2.0), (16, 12.0), (128, 6.0)])
def test_the_floor_is_the_minimum_that_an_optimiser_finds(keys, norm):
    def on_the_sphere(free):
        centred = free - free.mean()
        return float(entropy(centred * norm / np.linalg.norm(centred)))

    generator = np.random.default_rng(0)
    starts = [generator.normal(size=keys) for _ in range(2)] + [np.eye(keys)[0] + 0.01 * generator.normal(size=keys)]
    least = min(optimize.minimize(on_the_sphere, start, method="L-BFGS-B").fun for start in starts)
    assert_golden("en-floor-tight", least - float(entropy_floor(norm, keys=keys)))


@pytest.mark.parametrize("keys", [8, 64])
def test_no_row_is_below_its_certificate(keys):
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(2000, keys)) * generator.uniform(0, 12, size=(2000, 1)) + 5.0
    floor = entropy_floor(row_logit_norm(rows), keys=keys)
    assert (entropy(rows) >= floor - 1e-12).all()
    assert (floor >= 0).all()
    assert float(entropy_floor(0.0, keys=keys)) == pytest.approx(math.log(keys))


def test_the_norm_for_an_entropy_undoes_the_floor():
    keys = np.array([8, 64, 512])
    norms = norm_for_entropy(1.0, keys=keys)
    assert entropy_floor(norms, keys=keys) == pytest.approx(np.ones(3))
    assert (np.diff(norms) > 0).all()


# ------------------------------------------------------------ ceilings and scales


def test_the_causal_ceiling_is_the_mean_of_the_logarithms():
    contexts = np.array([64, 128, 256, 512, 1024])
    assert_golden("en-causal-ceiling", causal_ceiling(contexts))
    counted = [np.mean(np.log(np.arange(1, context + 1))) for context in contexts]
    assert causal_ceiling(contexts) == pytest.approx(counted)
    assert (causal_ceiling(contexts) < np.log(contexts)).all()


def test_a_summed_penalty_weighs_as_many_times_as_it_has_rows():
    assert_golden("en-regulariser-scale", float(mean_reduced_weight(1e-5, batch=128, queries=128)))


def test_the_gauge_of_default_initialisations():
    sizes = {"depth": 1, "width": 768, "heads": 1, "context": 512}
    usual = Architecture(**sizes)
    fan_in = Architecture(**sizes, std_q=768**-0.5, std_k=768**-0.5)
    assert_golden("en-default-gauge", [usual.gauge, fan_in.gauge])


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (128, 4)])
def test_an_architectures_logit_std_is_that_of_random_tokens(width, heads):
    generator = torch.Generator().manual_seed(0)
    one = Architecture(depth=1, width=width, heads=heads, std_q=0.1, std_k=0.05)
    own = width // heads
    x = torch.randn(256, width, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(width) / x.norm(dim=1, keepdim=True)
    found = []
    for _ in range(24):
        q = x @ (0.1 * torch.randn(width, own, generator=generator, dtype=torch.float64))
        k = x @ (0.05 * torch.randn(width, own, generator=generator, dtype=torch.float64))
        logits = q @ k.T / math.sqrt(own)
        found.append(float(logits[~torch.eye(256, dtype=torch.bool)].var()))
    assert math.sqrt(np.mean(found)) == pytest.approx(one.logit_std, rel=0.06)


# ------------------------------------------------------------ carried scores


def test_an_average_of_scores_is_flatter_than_what_it_averages():
    carry = np.array([0.2, 0.5, 0.7])
    assert_golden("ha-ema-shrink", stationary_spread(carry))
    assert carried_spread(200, carry=carry) == pytest.approx(stationary_spread(carry))


@pytest.mark.parametrize("how", ["average", "sum", "mean"])
@pytest.mark.parametrize("start", ["zero", "first"])
def test_carried_scores_have_the_spread_that_is_simulated(how, start):
    generator = np.random.default_rng(2)
    layers, carry = 5, 0.6
    scores = generator.normal(size=(layers, 200_000))
    held = np.zeros(scores.shape[1])
    for layer in range(1, layers + 1):
        own = scores[layer - 1]
        if how == "average":
            held = own if layer == 1 and start == "first" else carry * held + (1 - carry) * own
        elif how == "sum":
            held = held + own
        else:
            held = (held * (layer - 1) + own) / layer
        expected = float(carried_spread(layer, how=how, carry=carry, start=start))
        assert held.std() == pytest.approx(expected, rel=0.01)
