"""Numbers of weights against their definitions, against what theory says of random and of trained ones."""

import math

import pytest
import torch
from torch import nn

import fullrank.metrics as metrics
from fullrank.errors import ShapeError
from golden import assert_golden
from oracles import weights as naive

ONE = ["weight_rms", "condensation", "spectral_norm", "weight_stable_rank", "weight_effective_rank"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_a_number_of_one_weight_is_its_definition(name, shape):
    W = draw(*shape)
    W[2] = 3 * W[1]
    expected = getattr(naive, name)(W)
    assert float(getattr(metrics, name)(W)) == pytest.approx(expected, rel=1e-9)
    assert float(getattr(metrics, name)(W.float())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("width", "inner"), [(8, 3), (6, 6)])
def test_a_number_of_a_circuit_is_that_of_the_matrix_between_the_streams(width, inner):
    W_Q, W_K, W_V, W_O = (
        draw(inner, width),
        draw(inner, width, seed=1),
        draw(inner, width, seed=2),
        draw(width, inner, seed=3),
    )
    found = metrics.qk_eigenvalue_variance(W_Q, W_K)
    assert float(found) == pytest.approx(naive.qk_eigenvalue_variance(W_Q, W_K), rel=1e-8)
    assert float(metrics.value_output_sign(W_V, W_O)) == pytest.approx(naive.value_output_sign(W_V, W_O))


def test_heads_are_taken_one_by_one():
    W_Q, W_K, W_V, W_O = draw(4, 3, 8), draw(4, 3, 8, seed=1), draw(4, 3, 8, seed=2), draw(4, 8, 3, seed=3)
    variance, sign = metrics.qk_eigenvalue_variance(W_Q, W_K), metrics.value_output_sign(W_V, W_O)
    for h in range(4):
        assert float(variance[h]) == pytest.approx(naive.qk_eigenvalue_variance(W_Q[h], W_K[h]))
        assert float(sign[h]) == pytest.approx(naive.value_output_sign(W_V[h], W_O[h]))


def test_many_rows_are_compared_by_blocks(monkeypatch):
    import fullrank.metrics.weights as module

    W = draw(11, 4)
    whole = metrics.condensation(W)
    monkeypatch.setattr(module, "_BLOCK", 3)
    torch.testing.assert_close(metrics.condensation(W), whole)


def test_parallel_and_opposite_rows_are_condensed_and_zeros_enter_no_pair():
    W = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.0, 0.0], [3.0, 6.0]])
    assert float(metrics.condensation(W)) == pytest.approx(1)
    assert math.isnan(float(metrics.condensation(W[1:3])))


def test_random_rows_have_the_null_condensation():
    W = draw(200, 64)
    assert float(metrics.condensation(W)) == pytest.approx(math.sqrt(2 / (math.pi * 64)), rel=0.02)


def test_one_direction_has_rank_one_and_an_isometry_full_rank():
    one = torch.outer(draw(6), draw(9, seed=1))
    isometry = torch.linalg.qr(draw(9, 6)).Q
    for name, full in (("weight_stable_rank", 6), ("weight_effective_rank", 6)):
        assert float(getattr(metrics, name)(one)) == pytest.approx(1, abs=1e-5)
        assert float(getattr(metrics, name)(isometry)) == pytest.approx(full)
    assert float(metrics.spectral_norm(5 * isometry)) == pytest.approx(5)


def test_keys_that_copy_queries_have_positive_eigenvalues_and_the_variance_of_their_squares():
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    W = torch.diag(sigma) @ torch.linalg.qr(draw(8, 3)).Q.T
    found = float(metrics.qk_eigenvalue_variance(W, W))
    squares = torch.cat([sigma.square(), torch.zeros(5, dtype=torch.float64)])
    assert found == pytest.approx(float(squares.var(correction=0)))


def test_random_heads_have_the_null_variance():
    # the d_k non-zero eigenvalues of independent weights fill a disc of radius √(d d_k): Σ|λ|²/d is about d_k²/2
    W_Q, W_K = draw(200, 8, 256), draw(200, 8, 256, seed=1)
    assert float(metrics.qk_eigenvalue_variance(W_Q, W_K).mean()) == pytest.approx(32, rel=0.05)


@pytest.mark.parametrize(("factor", "sign"), [(1.0, 1.0), (-0.2, -1.0)])
def test_a_head_that_copies_tokens_smooths_and_one_that_subtracts_them_does_not(factor, sign):
    W_V = draw(3, 8)
    assert float(metrics.value_output_sign(W_V, factor * W_V.T)) == sign


def test_a_head_that_writes_nothing_has_no_sign():
    assert math.isnan(float(metrics.value_output_sign(torch.zeros(3, 8), torch.zeros(8, 3))))
    assert math.isnan(float(metrics.value_output_sign(torch.full((3, 8), torch.inf), torch.ones(8, 3))))
    assert math.isnan(float(metrics.qk_eigenvalue_variance(torch.full((3, 8), torch.nan), torch.ones(3, 8))))


def test_circuits_that_do_not_lead_back_to_the_stream_are_refused():
    with pytest.raises(ShapeError, match="same shape"):
        metrics.qk_eigenvalue_variance(draw(3, 8), draw(3, 6))
    with pytest.raises(ShapeError, match="back to it"):
        metrics.value_output_sign(draw(3, 8), draw(6, 3))


def test_small_initial_weights_condense_while_a_tanh_network_learns():
    # card condensation (Zhou et al. 2022): 5-50-1, all weights N(0, .005²), full-batch Adam
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(80, 5, generator=generator, dtype=torch.float64) * 6 - 4
    y = (3.5 * torch.sin(5 * x + 1)).sum(1, keepdim=True)
    W_1, b_1, W_2, b_2 = (
        nn.Parameter(0.005 * torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in ((50, 5), (50,), (1, 50), (1,))
    )
    optimiser = torch.optim.Adam([W_1, b_1, W_2, b_2], lr=1e-3)
    seen = []
    for epoch in range(101):
        if epoch in (0, 20, 50, 100):
            seen.append(float(metrics.condensation(torch.cat([W_1, b_1[:, None]], 1).detach())))
        loss = (torch.tanh(x @ W_1.T + b_1) @ W_2.T + b_2 - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_golden("cond-zhou-tanh", seen)


def first_stage(seed):
    """Gradient flow of E = v W_V W_1 W_2 until E = 1e9: effective rank of W_V before and after, mean |cos| with v."""
    d = 16
    generator = torch.Generator().manual_seed(seed)
    W_V, W_1, W_2, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, d), (d, d), (d,), (d,))
    )
    v = v / v.norm()
    before = float(metrics.weight_effective_rank(W_V))

    def flow(W_V, W_1, W_2):
        w, u = v @ W_V, W_1 @ W_2
        return torch.outer(v, u), torch.outer(w, W_2), W_1.T @ w

    while float(v @ W_V @ W_1 @ W_2) < 1e9:
        state = (W_V, W_1, W_2)
        slope = flow(*state)
        step = 1e-2 / max(float(k.norm() / s.norm()) for k, s in zip(slope, state, strict=True))
        middle = flow(*(s + step / 2 * k for s, k in zip(state, slope, strict=True)))
        W_V, W_1, W_2 = (s + step * k for s, k in zip(state, middle, strict=True))
    cosines = (W_V.T @ v).abs() / W_V.norm(dim=0)
    return before, float(metrics.weight_effective_rank(W_V)), float(cosines.mean())


def test_values_collapse_onto_one_direction_in_the_first_stage_of_training_from_small_weights():
    # card condensation (Chen and Luo); the mean over draws, of which one in four has a column that hardly grows
    before, after, aligned = torch.tensor([first_stage(seed) for seed in range(8)]).mean(0).tolist()
    assert_golden("cond-stage1-alignment", aligned)
    assert_golden("cond-stage1-erank", [before, after])


@pytest.mark.parametrize(("rows", "share"), [(32, 0.8), (64, 0.92), (2048, 0.998)])
def test_the_null_effective_rank_is_four_fifths_of_a_square_and_nearly_all_of_a_long_matrix(rows, share):
    W = draw(40, rows, 32)
    for one in (W, W.mT):
        assert float(metrics.weight_effective_rank(one).mean()) / 32 == pytest.approx(share, abs=0.015)
    # of states the same law, and of squares of the singular values e^(−½) of a square
    assert float(metrics.effective_rank(W).mean()) / 32 == pytest.approx(share, abs=0.015)
    if rows == 32:
        assert float(metrics.spectral_entropy_rank(W).mean()) / 32 == pytest.approx(math.exp(-0.5), abs=0.015)
    if rows == 2048:
        assert float(metrics.spectral_entropy_rank(W).mean()) / 32 > 0.98
