"""Metrics of gradients against their definitions, written out; golden numbers of the papers."""

import math

import pytest
import torch
from torch.testing import assert_close

import fullrank.metrics as metrics
from fullrank.errors import BatchError
from fullrank.metrics.gradients import from_squares
from golden import assert_golden


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_norm(G):
    return math.sqrt(sum(float(g) ** 2 for g in G.detach().flatten()))


def test_gain_is_the_ratio_of_norms_over_real_tokens():
    G, G_L = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    mask = torch.tensor([[True] * 4, [False, True, True, False]])
    G[1, 0] = torch.nan  # whatever stands at padded tokens
    expected = [naive_norm(a[m]) / naive_norm(b[m]) for a, b, m in zip(G, G_L, mask, strict=True)]
    assert_close(metrics.gradient_gain(G, G_L, mask), torch.tensor(expected, dtype=torch.float64))


def test_gain_survives_sizes_whose_squares_do_not():
    G, G_L = draw(5, 3, dtype=torch.float32), draw(5, 3, seed=1, dtype=torch.float32)
    plain = metrics.gradient_gain(G, G_L)
    assert_close(metrics.gradient_gain(G * 2.0**-90, G_L * 2.0**-90), plain, rtol=1e-6, atol=0)
    assert_close(metrics.gradient_gain(G * 2.0**-90, G_L), plain * 2.0**-90, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_any_tensor_in_any_dtype(shape, dtype):
    G = draw(*shape).to(dtype)
    assert float(metrics.gradient_norm(G)) == pytest.approx(naive_norm(G), rel=1e-9)


def test_norm_is_added_up_in_float64_and_in_pieces():
    G = draw(1500, 1500, dtype=torch.float32)
    exact = G.double().square().sum().sqrt()
    assert float(metrics.gradient_norm(G)) == pytest.approx(float(exact), rel=1e-12)
    assert float(metrics.gradient_norm(G.T[:700])) == pytest.approx(float(G.T[:700].double().norm()), rel=1e-12)
    assert float(metrics.gradient_norm(torch.full((4,), 1e-30))) == pytest.approx(2e-30, rel=1e-6)


def test_elasticity_bounds_what_a_relative_step_can_do_and_is_blind_to_scales_handed_on():
    W, X = draw(4, 3).requires_grad_(), draw(5, 4, seed=1)
    V = draw(3, 2, seed=2).requires_grad_()

    def loss(W, V):
        return (X @ W @ V).square().sum()

    G_W, G_V = torch.autograd.grad(loss(W, V), (W, V))
    e = metrics.elasticity(W.detach(), G_W)
    assert float(e) == pytest.approx(naive_norm(W) * naive_norm(G_W))
    step = 1e-6 * draw(4, 3, seed=3)
    change = abs(float((loss(W + step, V) - loss(W, V)).detach()))
    assert change <= float(step.norm() / W.detach().norm() * e) * 1.001
    scaled = (10 * W).detach().requires_grad_(), (V / 10).detach().requires_grad_()
    for tensor, gradient, e in zip(
        scaled,
        torch.autograd.grad(loss(*scaled), scaled),
        (metrics.elasticity(W.detach(), G_W), metrics.elasticity(V.detach(), G_V)),
        strict=True,
    ):
        assert_close(metrics.elasticity(tensor.detach(), gradient), e)


def test_ratios_of_queries_and_keys_to_values_and_output():
    e = [torch.tensor(x, dtype=torch.float64) for x in (3.0, 4.0, 6.0, 8.0)]
    assert float(metrics.elasticity_ratio(*e)) == pytest.approx(0.5)
    four = [draw(*shape, seed=i) for i, shape in enumerate([(4, 2), (4, 3), (5, 2), (2, 2)])]
    qk = [float(x) ** 2 for G in four[:2] for x in G.flatten()]
    vo = [float(x) ** 2 for G in four[2:] for x in G.flatten()]
    expected = math.sqrt(sum(qk) / len(qk) / (sum(vo) / len(vo)))
    assert float(metrics.query_key_to_value_output(*four)) == pytest.approx(expected)


def naive_gini(x):
    return sum(abs(a - b) for a in x for b in x) / (2 * len(x) ** 2 * (sum(x) / len(x)))


def test_heterogeneity_is_the_gini_coefficient_of_sizes_per_entry():
    norms, sizes = draw(9).abs(), torch.arange(1, 10)
    x = [float(n) / math.sqrt(int(P)) for n, P in zip(norms, sizes, strict=True)]
    assert float(metrics.gradient_heterogeneity(norms, sizes)) == pytest.approx(naive_gini(x))
    same = metrics.gradient_heterogeneity(sizes.double().sqrt(), sizes)
    assert float(same) == pytest.approx(0, abs=1e-15)
    one = torch.zeros(8, dtype=torch.float64)
    one[3] = 5.0
    assert float(metrics.gradient_heterogeneity(one, torch.ones(8))) == pytest.approx(1 - 1 / 8)
    with pytest.raises(BatchError, match="sizes has shape"):
        metrics.gradient_heterogeneity(norms, sizes[:3])


def test_exponents_are_rates_per_layer():
    rho_0, rho_L = torch.tensor([0.9, 0.99]), torch.tensor([0.99, 0.9])
    found = metrics.angle_exponent(rho_0.double(), rho_L.double(), layers=5)
    assert_close(found, torch.tensor([math.log(0.1) / 5, math.log(10) / 5], dtype=torch.float64), rtol=1e-5, atol=0)
    gain = torch.tensor([math.exp(3.0)], dtype=torch.float64)
    assert float(metrics.gradient_exponent(gain, layers=6)) == pytest.approx(1.0)
    for function in (
        lambda: metrics.angle_exponent(rho_0, rho_L, layers=0),
        lambda: metrics.gradient_exponent(gain, layers=0),
    ):
        with pytest.raises(BatchError, match="at least one"):
            function()


def test_the_angle_exponent_is_undefined_where_the_tokens_are_one_to_rounding():
    rho = torch.tensor([1 - 1e-9, 0.5])
    found = metrics.angle_exponent(torch.tensor([0.5, 0.5]), rho, layers=2, dtype=torch.float32)
    assert found.isnan().tolist() == [True, False]


def test_the_angle_exponent_of_two_nearly_equal_tokens_is_that_of_a_linear_map_of_their_difference():
    """Near ρ = 1, 1 − ρ is the squared angle: a layer that doubles it has the exponent 2 log 2."""
    x, y = draw(64), draw(64, seed=1)
    y = y - (x @ y) / (x @ x) * x
    y = y / y.norm() * x.norm()
    before, after = (torch.stack([x, x * math.cos(a) + y * math.sin(a)]) for a in (1e-2, 2e-2))
    found = metrics.angle_exponent(metrics.similarity(before), metrics.similarity(after), layers=1)
    assert float(found) == pytest.approx(2 * math.log(2), rel=1e-4)


# ------------------------------------------------------------ golden numbers


def tokens_of_cosine(rho, T, d, generator):
    shared, own = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (1, T))
    shared = shared / shared.norm()
    own = own - own @ shared.T * shared
    return math.sqrt(d) * (math.sqrt(rho) * shared + math.sqrt(1 - rho) * own / own.norm(dim=-1, keepdim=True))


def squared_gradients(rho, *, tau=1.0, T=64, d=64, draws=4, probes=24):
    """E ‖∂S/∂W_Q‖² and E ‖∂S/∂W_V‖² of one layer at W_Q = 0, by random projections of S."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(draws):
        X = tokens_of_cosine(rho, T, d, generator)
        W_K, W_V = (torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d) for _ in range(2))
        W_Q = torch.zeros(d, d, dtype=torch.float64, requires_grad=True)  # then attention is uniform
        W_V.requires_grad_()
        A = (tau / math.sqrt(d) * (X @ W_Q) @ (X @ W_K).T).softmax(-1)
        S = A @ X @ W_V
        for _ in range(probes):
            G = torch.randn(S.shape, generator=generator, dtype=torch.float64)
            grads = torch.autograd.grad(S, (W_Q, W_V), G, retain_graph=True)
            found.append(torch.stack([metrics.gradient_norm(g).square() for g in grads]))
    return torch.stack(found).mean(0)


def test_golden_gradients_of_queries_and_values_against_token_cosine():
    found = torch.stack([squared_gradients(rho) for rho in (0.0, 0.5, 0.9)])
    assert_golden("noci-gradient-q", found[:, 0])
    assert_golden("noci-gradient-v", found[:, 1])
    hot = squared_gradients(0.5, tau=2.0)
    assert float(hot[0] / found[1, 0]) == pytest.approx(4, rel=1e-6)


def test_golden_exponents_of_gradients_in_width():
    """‖∂X_L/∂W_1‖² by random projections: a pure attention stack at init, with and without the mean direction."""

    def norms(T, L, centred, generator):
        d = T
        X = torch.linalg.qr(torch.randn(T, d, generator=generator)).Q
        W_1 = torch.randn(d, d, generator=generator).requires_grad_()
        state = X
        for layer in range(L):
            D = torch.randn(T, T, generator=generator).mul(math.sqrt(math.log(2))).exp()
            A = D / D.sum(-1, keepdim=True)
            A = A - 1 / T if centred else A
            state = A @ state @ (W_1 if layer == 0 else torch.randn(d, d, generator=generator))
        squares = []
        for _ in range(12):
            G = torch.randn(state.shape, generator=generator)
            squares.append(metrics.gradient_norm(torch.autograd.grad(state, W_1, G, retain_graph=True)[0]).square())
        return torch.stack(squares).mean()

    def slope(L, centred):
        generator = torch.Generator().manual_seed(L + 10 * centred)
        sizes = (50, 100, 200, 300)
        y = torch.stack([torch.stack([norms(T, L, centred, generator) for _ in range(3)]).mean().log() for T in sizes])
        x = torch.tensor(sizes).double().log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())

    assert_golden("mtg-gradient-exponent-vanilla", [slope(L, False) for L in (1, 2)])
    assert_golden("mtg-gradient-exponent-fix", [slope(L, True) for L in (1, 2)])


def test_the_ratio_of_root_mean_squares_is_had_from_norms_and_sizes_alone():
    four = [draw(*shape, seed=i) for i, shape in enumerate([(4, 2), (4, 3), (5, 2), (2, 2)])]
    squares = [torch.tensor(naive_norm(G) ** 2, dtype=torch.float64) for G in four]
    found = from_squares(squares, [8, 12, 10, 4])
    assert float(found) ** 2 == pytest.approx(float((squares[0] + squares[1]) / 20 / ((squares[2] + squares[3]) / 14)))
    assert_close(found, metrics.query_key_to_value_output(*four))
    louder = [torch.stack([s, 4 * s]) for s in squares[:2]] + [s.expand(2) for s in squares[2:]]
    assert_close(from_squares(louder, [8, 12, 10, 4]), torch.stack([found, 2 * found]))
