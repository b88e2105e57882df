"""Gradients of queries, keys and values of one attention layer, against autograd."""

import math

import numpy as np
import pytest
import torch

from fullrank.theory.giorlandino_goldt_gradients import (
    gradient_bracket,
    gradient_bracket_limit,
    query_gradient,
    value_gradient,
)
from fullrank.theory.random_energy import inverse_participation
from golden import assert_golden, golden


def test_the_bracket_at_finite_context_meets_the_golden_numbers():
    s = np.array([2.0, 3.0, 5.0]) * math.sqrt(math.log(2048))
    assert_golden("gg-gradient-bracket", gradient_bracket(s, 2048))


@pytest.mark.parametrize(("s", "keys"), [(0.0, 40), (1.5, 100), (5.0, 30)])
def test_the_bracket_is_that_of_sampled_rows(s: float, keys: int):
    logits = s * np.random.default_rng(4).standard_normal((8000, keys))
    A = np.exp(logits - logits.max(1, keepdims=True))
    A /= A.sum(1, keepdims=True)
    Y2, Y3 = (A**2).sum(1), (A**3).sum(1)
    sampled = Y2 - 2 * Y3 + Y2**2
    assert abs(gradient_bracket(s, keys) - sampled.mean()) < 4 * sampled.std() / math.sqrt(8000) + 1e-5


def test_the_bracket_has_its_limit_above_the_transition_and_vanishes_below():
    np.testing.assert_allclose(
        gradient_bracket_limit([0.5, math.sqrt(2), 2 * math.sqrt(2)]), [0, 0, 1 / 12], atol=1e-15
    )
    b = 4.0
    near, far = (gradient_bracket(b * math.sqrt(math.log(n)), n) for n in (10**6, 10**2))
    assert abs(near - gradient_bracket_limit(b)) < abs(far - gradient_bracket_limit(b))
    below, further = (gradient_bracket(0.7 * math.sqrt(math.log(n)), n) for n in (10**6, 10**2))
    assert below < 1e-3 < further


def autograd(tokens: int, width: int, head_width: int, rho: float, qk: float, draws: int) -> dict[str, float]:
    """Mean squared norms over draws of a head's weights, tokens and upstream gradients."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"q": 0.0, "k": 0.0, "v": 0.0}
    for _ in range(draws):
        X = math.sqrt(rho) * draw(1, width) + math.sqrt(1 - rho) * draw(tokens, width)
        W = {name: draw(width, head_width) / math.sqrt(width) for name in found}
        W["q"], W["k"] = qk * W["q"], 2 * qk * W["k"]
        for one in W.values():
            one.requires_grad_()
        A = ((X @ W["q"]) @ (X @ W["k"]).T / (2 * math.sqrt(head_width))).softmax(-1)
        gradients = torch.autograd.grad((A @ X @ W["v"] * draw(tokens, head_width)).sum(), list(W.values()))
        for name, gradient in zip(W, gradients, strict=True):
            found[name] += float(gradient.square().sum()) / draws
    return found


@pytest.mark.parametrize(("tokens", "width", "head_width"), [(48, 64, 32), (128, 128, 64)])
@pytest.mark.parametrize(("rho", "qk"), [(0.0, 0.7), (0.5, 1.0), (0.2, 2.0)])
def test_gradient_norms_are_those_of_autograd(tokens: int, width: int, head_width: int, rho: float, qk: float):
    found = autograd(tokens, width, head_width, rho, qk, draws=40)
    s = qk * qk * math.sqrt(1 - rho)
    shape = {"tokens": tokens, "width": width, "head_width": head_width}
    scale = 1 / (2 * math.sqrt(head_width))
    bracket = gradient_bracket(s, tokens, width=width)
    std = width**-0.5
    query = query_gradient(1, rho, bracket, std_key=2 * qk * std, std_value=std, logit_scale=scale, **shape)
    key = query_gradient(1, rho, bracket, std_key=qk * std, std_value=std, logit_scale=scale, **shape)
    assert query == pytest.approx(found["q"], rel=0.25)
    assert key == pytest.approx(found["k"], rel=0.25)
    assert value_gradient(1, rho, inverse_participation(s, tokens), **shape) == pytest.approx(found["v"], rel=0.25)


def test_queries_have_no_gradient_where_tokens_agree_and_values_have():
    shape = {"tokens": 64, "width": 64}
    assert query_gradient(1, 1, 0.05, std_key=0.1, std_value=0.1, **shape) == 0
    assert value_gradient(1, 1, 0.05, **shape) == pytest.approx(64**3)


def test_with_one_head_of_full_width_it_is_the_papers_law():
    d, T, beta, q, p, value_gain = 256, 2048, 3.0, 1.0, 0.2, 0.7
    sigma_a = beta * math.sqrt(math.log(T))
    found = query_gradient(
        q, p, 0.05, tokens=T, width=d, std_key=math.sqrt(sigma_a / d), std_value=math.sqrt(value_gain / d)
    )
    assert found == pytest.approx(T * d**2 * value_gain * sigma_a * q * (q - p) ** 2 * 0.05)


def test_the_shape_over_beta_is_that_of_the_papers_trained_layer():
    beta = np.array([0.44, 0.65, 0.87, 1.08, 1.29, 1.5, 1.93, 2.36, 3.0])
    scaled = beta * gradient_bracket(beta * math.sqrt(math.log(2048)), 2048, width=256)
    entry = golden("gg-query-gradient-shape")
    ratio = scaled / scaled[-1] / np.array(entry["expected"])
    assert (abs(np.log(ratio[1:])) <= math.log(entry["tolerance"])).all()
    assert 0.5 < ratio[0] < 1  # at the smallest β real sequences, which repeat words, have somewhat more
