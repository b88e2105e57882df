"""Dong's paths, rate and bound against stacks of attention that are really run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden, golden

from fullrank.theory.dong import (
    composite_norm,
    cubic_decrements,
    mean_path_length,
    path_length_probability,
    path_lengths,
    residual_bound,
)

# ------------------------------------------------------------ paths


def test_path_probabilities_meet_their_golden_numbers():
    length, depth, heads = np.array([12, 11, 6, 96, 12]), np.array([12, 12, 6, 96, 12]), np.array([12, 12, 12, 96, 3])
    assert_golden("dong-path-probability", path_length_probability(length, depth=depth, heads=heads))


@pytest.mark.parametrize(("depth", "heads"), [(3, 2), (5, 3)])
def test_probabilities_are_counts_of_every_path(depth, heads):
    paths = list(itertools.product(range(heads + 1), repeat=depth))  # the last choice is the skip
    counts = np.bincount([sum(step < heads for step in path) for path in paths], minlength=depth + 1)
    assert path_lengths(depth=depth, heads=heads) == pytest.approx(counts / len(paths))
    mean = counts @ np.arange(depth + 1) / len(paths)
    assert float(mean_path_length(depth=depth, heads=heads)) == pytest.approx(mean)


def test_there_is_no_path_longer_than_the_stack_and_all_of_them_add_to_one():
    assert path_length_probability(np.array([-1, 7]), depth=6, heads=4).tolist() == [0.0, 0.0]
    assert path_lengths(depth=96, heads=96).sum() == pytest.approx(1.0)


# ------------------------------------------------------------ stacks of attention


def attention_stack(count, width, heads, size, layers, generator, *, skip=False):
    """Residuals ‖X − 1x̄ᵀ‖_F/‖X‖_F over layers, in float64 and centred anew; and the first layer's weights."""
    x = size * torch.randn(count, width, generator=generator, dtype=torch.float64)
    own = width // heads
    found, first = [], None
    for _ in range(layers):
        written = torch.zeros_like(x)
        weights = []
        for _ in range(heads):
            q, k, v = (torch.randn(width, own, generator=generator, dtype=torch.float64) / width**0.5 for _ in "qkv")
            o = torch.randn(own, width, generator=generator, dtype=torch.float64) / width**0.5
            written += ((x @ q) @ (x @ k).T / own**0.5).softmax(1) @ x @ v @ o
            weights.append((q @ k.T, v @ o))
        first = first or weights
        x = x + written if skip else written
        centred = x - x.mean(0, keepdim=True)
        found.append(float(centred.norm() / x.norm()))
    return found, first


def test_the_rate_of_pure_attention_is_cubic_until_the_floor():
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for size in (0.3, 0.5, 0.7, 0.85, 1.0) * 4:
        residuals, _ = attention_stack(32, 64, 1, size, 6, generator)
        # what is below float64's floor is rounding: falls are seen down to the last residual above it
        above = [r for r in residuals if r > 1e-13]
        falls = [math.log(a / b) for a, b in itertools.pairwise(above)]
        ratios += [after / before for before, after in itertools.pairwise(falls) if before >= 1]
    assert len(ratios) >= 3
    assert_golden("dong-cubic-rate", float(np.median(ratios)))
    assert cubic_decrements(0.5, layers=3).tolist() == [0.5, 1.5, 4.5]


def test_a_skip_keeps_the_residual():
    generator = torch.Generator().manual_seed(1)
    draws = [attention_stack(32, 64, 1, 1.0, 6, generator, skip=True)[0] for _ in range(8)]
    mean = np.mean(draws, 0)
    assert_golden("dong-skip-residual", [mean[0], mean[-1]])


# ------------------------------------------------------------ the bound


def bounded(count, width, heads, size, depth, generator):
    x = size * torch.randn(count, width, generator=generator, dtype=torch.float64)
    _, weights = attention_stack(count, width, heads, size, 1, generator)
    beta = max(float(torch.linalg.matrix_norm(qk, 1)) * float(composite_norm(vo.numpy())) for qk, vo in weights)
    residual = float(composite_norm((x - x.mean(0)).numpy()))
    return residual_bound(residual, beta=beta, heads=heads, head_width=width // heads, depth=depth)


def test_the_bound_is_vacuous_at_ordinary_initialisations_and_says_so():
    generator = torch.Generator().manual_seed(2)
    found = [bounded(32, 64, 4, 1.0, 6, generator) for _ in range(6)]
    assert_golden("dong-bound-vacuous", float(np.exp(np.mean([math.log(one.factor) for one in found]))))
    assert all(one.vacuous and "vacuous" in one.says for one in found)


@pytest.mark.parametrize(("count", "width"), [(8, 16), (16, 32)])
def test_the_bound_holds_where_it_contracts(count, width):
    """Run the very stack whose weights the bound is given: what is left is below it, layer by layer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    q, k, v = (torch.randn(width, width, generator=generator, dtype=torch.float64) / width for _ in "qkv")
    beta = float(torch.linalg.matrix_norm(q @ k.T, 1)) * float(composite_norm(v.numpy()))
    start = float(composite_norm((x - x.mean(0)).numpy()))
    scale = 0.5 / math.sqrt(4 * beta / math.sqrt(width)) / start  # so that the condition holds
    x, start = x * scale, start * scale
    for depth in (1, 2, 3):
        bound = residual_bound(start, beta=beta, heads=1, head_width=width, depth=depth)
        assert not bound.vacuous
        y = x
        for _ in range(depth):
            y = ((y @ q) @ (y @ k).T / math.sqrt(width)).softmax(1) @ y @ v
        assert math.log(float(composite_norm((y - y.mean(0)).numpy()))) < bound.log_residual


def test_equal_tokens_and_the_composite_norm():
    assert residual_bound(0.0, beta=1.0, heads=1, head_width=4, depth=3).log_residual == -math.inf
    matrix = np.array([[1.0, -2.0], [3.0, 4.0]])
    assert float(composite_norm(matrix)) == pytest.approx(math.sqrt(6 * 7))
    assert composite_norm(np.stack([matrix, 2 * matrix])).tolist() == pytest.approx([42**0.5, 2 * 42**0.5])
    assert golden("dong-bound-vacuous")["kind"] == "factor"
