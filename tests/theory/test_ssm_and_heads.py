"""State-space channels against recurrences that are run; counts of what heads leave open against null spaces."""

from __future__ import annotations

import numpy as np
import pytest
from tests.golden import assert_golden

from fullrank.theory.head_channel import ambiguous_dimensions, gate_overhead, skip_keeps_rank
from fullrank.theory.ssm_oversmoothing import (
    channel_decay,
    recency_bound,
    recency_rate,
    residual_of_stack,
    spread_bound,
)

# ------------------------------------------------------------ state space


def scanned(decays, inputs):
    """h_t = A_t h_{t−1} + (1 − A_t) b_t from h_1 = b_1."""
    states = np.empty_like(inputs)
    states[0] = inputs[0]
    for t in range(1, len(inputs)):
        states[t] = decays[t] * states[t - 1] + (1 - decays[t]) * inputs[t]
    return states


def spread(x):
    return np.ptp(x, axis=0)


@pytest.mark.parametrize(("name", "low", "high"), [("ssm-spread", 0.5, 0.9), ("ssm-spread-slow", 0.99, 0.999)])
def test_states_spread_less_than_the_bound(name, low, high):
    generator = np.random.default_rng(0)
    decays = generator.uniform(low, high, size=(64, 400))
    inputs = generator.normal(size=(64, 400))
    ratios = spread(scanned(decays, inputs)) / spread(inputs)
    assert_golden(name, float(ratios.mean()))
    assert (ratios <= spread_bound(smallest_decay=decays.min(0), tokens=64)).all()


def test_the_first_token_is_forgotten_at_the_rate_of_the_decays():
    generator = np.random.default_rng(1)
    decays = generator.uniform(0.5, 0.9, size=(64, 2000))
    # the golden number is one draw; over draws the mean of the product is .7^63 = 1.7e-10, its median 7e-11
    assert_golden("ssm-recency", float(decays[1:].prod(0).mean()))
    for distance in (1, 5, 20):
        assert (decays[1 : 1 + distance].prod(0) <= recency_bound(distance, largest_decay=decays.max())).all()
    assert recency_bound(3, largest_decay=0.5) == pytest.approx(0.125)
    assert recency_rate(np.array([0.5, 1.0])).tolist() == pytest.approx([np.log(2), 0.0])


def test_stacked_layers_smooth():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(64, 128))
    found = []
    for _ in range(30):
        x = scanned(np.repeat(generator.uniform(0.5, 0.95, size=(64, 1)), 128, axis=1), x)
        found.append(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x))
    assert_golden("ssm-stacked", [found[0], found[-1]])


@pytest.mark.parametrize(("decay", "layers"), [(0.5, 1), (0.5, 6), (0.8, 3)])
def test_what_is_left_of_white_noise_is_the_mean_over_frequencies(decay, layers):
    x = np.random.default_rng(3).normal(size=200_000)
    before = x[2000:].std()
    for _ in range(layers):
        x = scanned(np.full(len(x), decay), x)
    assert x[2000:].std() / before == pytest.approx(float(residual_of_stack(layers, decay=decay)), rel=0.02)


def test_smoothing_falls_with_the_fourth_root_of_depth():
    deep = residual_of_stack(np.array([200, 3200]), decay=0.5)
    assert deep[0] / deep[1] == pytest.approx(2.0, rel=0.02)
    assert float(residual_of_stack(0, decay=0.9)) == 1.0


def test_the_zero_channel_is_not_zero_at_small_steps():
    assert_golden("ssm-zero-channel", channel_decay(100.0, step=np.array([1e-3, 1e-2, 1e-1])))
    assert float(channel_decay(0.0, step=0.5)) == 1.0


# ------------------------------------------------------------ heads


def test_ambiguous_dimensions_meet_their_golden_numbers():
    sizes = {"heads": 12, "head_width": 64, "width": 768}
    found = [ambiguous_dimensions(128, **sizes)]
    found += [ambiguous_dimensions(count, **sizes, readout=64) for count in (128, 512)]
    assert_golden("hc-head-dof", [float(one) for one in found])


@pytest.mark.parametrize(("heads", "own", "width", "seen"), [(3, 4, 12, None), (4, 4, 10, None), (3, 5, 15, 6)])
def test_they_are_the_dimension_of_a_null_space(heads, own, width, seen):
    generator = np.random.default_rng(4)
    output = generator.normal(size=(heads * own, width))
    through = output if seen is None else output @ generator.normal(size=(width, seen))
    tokens = 7
    whole = np.kron(np.eye(tokens), through.T)  # acts on the heads' outputs of all tokens
    null = whole.shape[1] - np.linalg.matrix_rank(whole)
    assert null == ambiguous_dimensions(tokens, heads=heads, head_width=own, width=width, readout=seen)


def test_a_gate_for_each_head_costs_one_over_the_head_width():
    assert_golden("hc-gate-overhead", float(gate_overhead(heads=12, width=768)))
    assert float(gate_overhead(heads=12, width=768, biases=True)) == 9228 / 590592


@pytest.mark.parametrize("size", [5, 9])
def test_a_skip_loses_rank_only_where_eigenvalues_multiply_to_minus_one(size):
    generator = np.random.default_rng(5)
    attention = generator.dirichlet(np.ones(size), size=size)
    weight = generator.normal(size=(size, size))
    whole = np.eye(size * size) + np.kron(weight.T, attention)
    assert skip_keeps_rank(attention, weight) == pytest.approx(np.abs(np.linalg.eigvals(whole)).min())
    assert skip_keeps_rank(attention, -np.eye(size)) == pytest.approx(0.0, abs=1e-12)  # X − AX loses the mean
