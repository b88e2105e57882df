"""The two stages of training from small weights against gradients and integrated flows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden

from fullrank import metrics
from fullrank.theory.condensation import (
    activation_time,
    data_matrix,
    escape_bound,
    first_stage_direction,
    first_stage_energy,
    second_stage,
    second_stage_limit,
)


def sequences(count, length, width, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, length, width)), generator.choice([-1.0, 1.0], size=count)


# ------------------------------------------------------------ first stage


@pytest.mark.parametrize("width", [6, 12])
def test_the_first_stage_moves_values_along_its_direction(width):
    """The gradient of the loss at small weights is, to leading order, that of −(length/ns) v W_V W_1 W_2."""
    x, y = sequences(40, 5, width)
    v, length = first_stage_direction(x, y)
    generator = torch.Generator().manual_seed(0)
    small = 1e-4
    draw = [small * torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(4)]
    leaves = [one.requires_grad_() for one in (*draw, small * torch.randn(width, generator=generator).double())]
    query, key, value, first, second = leaves
    tokens, labels = torch.tensor(x), torch.tensor(y)
    logits = torch.einsum("nd,nsd->ns", tokens[:, -1] @ query @ key.T, tokens) / math.sqrt(width)
    read = torch.tanh(torch.einsum("ns,nsd->nd", logits.softmax(1), tokens) @ value @ first) @ second
    (-labels * read).exp().mean().backward()
    outer = np.outer(v, (first @ second).detach().numpy()) * length / (40 * 5)
    assert -value.grad.numpy() == pytest.approx(outer, rel=1e-3, abs=1e-3 * np.abs(outer).max())
    energy = first_stage_energy(v, *(one.detach().numpy() for one in (value, first, second)))
    assert energy == pytest.approx(float((torch.tensor(v) @ value @ first @ second).detach()))


@pytest.mark.parametrize("width", [8, 16])
def test_the_first_stage_blows_up_before_its_bound(width):
    """The flow of ∇(v W_V W_1 W_2), integrated: E reaches 10⁹ before E(0)^(−1/3)."""
    generator = np.random.default_rng(3)
    v = generator.normal(size=width)
    v /= np.linalg.norm(v)
    tried = 0
    while tried < 2:
        state = [generator.normal(size=s) for s in ((width, width), (width, width), (width,))]
        begun = first_stage_energy(v, *state)
        if begun <= 0.1:
            assert begun > 0 or math.isinf(float(escape_bound(begun)))
            continue
        tried += 1
        time, bound = 0.0, float(escape_bound(begun))
        while first_stage_energy(v, *state) < 1e9:

            def slope(now):
                value, first, second = now
                left, right = v @ value, first @ second
                return [np.outer(v, right), np.outer(left, second), first.T @ left]

            rates = slope(state)
            step = 5e-3 / max(np.linalg.norm(r) / np.linalg.norm(s) for r, s in zip(rates, state, strict=True))
            middle = slope([s + step / 2 * r for s, r in zip(state, rates, strict=True)])
            state = [s + step * r for s, r in zip(state, middle, strict=True)]
            time += step
        assert time < bound


# ------------------------------------------------------------ second stage


@pytest.mark.parametrize(("length", "width"), [(5, 6), (9, 10)])
def test_queries_and_keys_move_by_the_data_matrix(length, width):
    x, y = sequences(30, length, width, seed=1)
    generator = torch.Generator().manual_seed(1)
    readout = 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    query, key = (
        (1e-5 * torch.randn(width, width, generator=generator, dtype=torch.float64)).requires_grad_() for _ in "qk"
    )
    tokens, labels = torch.tensor(x), torch.tensor(y)
    logits = torch.einsum("nd,nsd->ns", tokens[:, -1] @ query @ key.T, tokens) / math.sqrt(width)
    read = torch.einsum("ns,nsd->nd", logits.softmax(1), tokens) @ readout
    (-labels * read).exp().mean().backward()
    F = data_matrix(x, y, readout.numpy())
    for grad, expected in ((query.grad, F @ key.detach().numpy()), (key.grad, F.T @ query.detach().numpy())):
        assert -grad.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4 * np.abs(expected).max())


def test_tokens_that_are_alike_move_nothing():
    x, y = sequences(10, 6, 4)
    assert np.abs(data_matrix(np.repeat(x[:, :1], 6, axis=1), y, np.ones(4))).max() < 1e-13
    assert math.isinf(float(activation_time(np.zeros((4, 4)), size=1e-3)))


def rank_eight(width, generator):
    """A product of Gaussian matrices scaled to σ₁ = 1.19; the draw below has σ₂ = 1.17, as the golden number has."""
    product = generator.normal(size=(width, 8)) @ generator.normal(size=(8, width))
    return product * 1.19 / np.linalg.norm(product, 2)


def test_the_effective_rank_of_queries_over_the_second_stage():
    generator = np.random.default_rng(0)
    F = rank_eight(64, generator)
    assert np.linalg.svd(F)[1][1] == pytest.approx(1.17, abs=0.005)
    query, key = generator.normal(size=(2, 64, 64))
    found = []
    for units in (0.0, 10.0, 40.0):
        at = second_stage(F, query, key, units / 1.19)[0]
        found.append(float(metrics.weight_effective_rank(torch.tensor(at))))
    assert_golden("cond-stage2-erank", found)


@pytest.mark.parametrize("width", [5, 12])
def test_the_solution_is_that_of_small_steps(width):
    generator = np.random.default_rng(4)
    F = generator.normal(size=(width, width)) / math.sqrt(width)
    query, key = generator.normal(size=(2, width, 3))
    exact = second_stage(F, query, key, 1.5)
    steps, (q, k) = 3000, (query, key)
    h = 1.5 / steps
    for _ in range(steps):  # midpoint
        half_q, half_k = q + h / 2 * F @ k, k + h / 2 * F.T @ q
        q, k = q + h * F @ half_k, k + h * F.T @ half_q
    assert exact[0] == pytest.approx(q, rel=1e-5, abs=1e-5)
    assert exact[1] == pytest.approx(k, rel=1e-5, abs=1e-5)


def test_queries_and_keys_end_on_one_pair_and_grow_at_its_rate():
    generator = np.random.default_rng(5)
    F = np.diag([1.0, 0.5, 0.2, 0.1])
    query, key = 1e-4 * generator.normal(size=(2, 4, 4))
    u, v, p = second_stage_limit(F, query, key)
    late = second_stage(F, query, key, 40.0)
    for found, expected in ((late[0], np.outer(u, p)), (late[1], np.outer(v, p))):
        unit = [one / np.linalg.norm(one) for one in (found, expected)]
        assert unit[0] == pytest.approx(unit[1], abs=1e-8)
    grown = second_stage(F, query, key, float(activation_time(F, size=np.linalg.norm(p))))
    assert np.linalg.norm(grown[0]) == pytest.approx(1.0, rel=0.01)
