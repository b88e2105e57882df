"""Gaussian moments of activations against plain double integrals and against random layers."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from fullrank.errors import TheoryError
from fullrank.theory.activations import ACTIVATIONS, arc_cosine, gated_overlap, overlap

PHI = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0),
    "gelu": lambda u: u * ndtr(u),
    "silu": lambda u: u / (1 + np.exp(-u)),
    "tanh": np.tanh,
}


def _integral(name: str, q1: float, q2: float, r: float) -> float:
    z = np.linspace(-9, 9, 901)
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    second = math.sqrt(q2) * (r * z[:, None] + math.sqrt(1 - r * r) * z)
    return float(weight @ (PHI[name](math.sqrt(q1) * z)[:, None] * PHI[name](second)) @ weight)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("q1", "q2"), [(0.05, 0.05), (1.0, 1.0), (0.3, 2.0), (8.0, 8.0)])
def test_the_kernel_is_the_double_integral(name: str, q1: float, q2: float):
    size = math.sqrt(_integral(name, q1, q1, 1.0) * _integral(name, q2, q2, 1.0))
    for r in (-0.6, 0.0, 0.4, 0.9, 1.0):
        found = overlap(name, q1, q2, r * math.sqrt(q1 * q2))
        assert found == pytest.approx(_integral(name, q1, q2, r), abs=1.5e-3 * size)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [256, 1024])
def test_the_kernel_is_what_a_random_layer_does(name: str, width: int):
    rng = np.random.default_rng(width)
    c = 0.7
    x = rng.standard_normal((2, 64, 64))
    x[1] = c * x[0] + math.sqrt(1 - c * c) * x[1]
    x /= np.sqrt(np.mean(x**2, -1, keepdims=True))
    hidden = PHI[name](x @ rng.standard_normal((64, width)) / 8)
    cosines = np.mean(x[0] * x[1], -1)
    assert np.mean(hidden[0] * hidden[1]) == pytest.approx(
        np.mean(overlap(name, 1, 1, cosines)), abs=6 / math.sqrt(width * 64)
    )


def test_gates_multiply_their_moments():
    rng = np.random.default_rng(3)
    g, u = (
        rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 400_000).T,
        rng.multivariate_normal([0, 0], [[2, 0.6], [0.6, 2]], 400_000).T,
    )
    sampled = np.mean(PHI["silu"](g[0]) * PHI["silu"](g[1]) * u[0] * u[1])
    assert gated_overlap("silu", (1, 1, 0.5), 0.6) == pytest.approx(sampled, abs=6e-3)


def test_arrays_are_the_same_as_loops():
    q, c = np.array([[0.5], [1.0], [4.0]]), np.array([-0.4, 0.0, 0.5])
    for name in ACTIVATIONS:
        together = overlap(name, q, q, c)
        alone = [[overlap(name, float(one), float(one), float(other)) for other in c] for one in q[:, 0]]
        np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-15)


def test_gelu_is_a_relu_for_huge_pre_activations():
    np.testing.assert_allclose(overlap("gelu", 1e30, 1e30, [1e30, 0.3e30]), overlap("relu", 1e30, 1e30, [1e30, 0.3e30]))


def test_the_arc_cosine_kernel_runs_from_one_over_pi_to_one():
    np.testing.assert_allclose(arc_cosine([-1.0, 0.0, 1.0, 1.0 + 1e-12]), [0.0, 1 / math.pi, 1.0, 1.0], atol=1e-12)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(TheoryError, match=r"'swish2'.*identity, relu, gelu, silu, tanh"):
        overlap("swish2", 1, 1, 0)
