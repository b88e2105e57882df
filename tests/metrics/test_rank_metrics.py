"""Spectra equal dense singular value decompositions, and the seven ranks their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fullrank.metrics as metrics
from oracles import states

RANKS = (
    "stable_rank",
    "gram_stable_rank",
    "effective_rank",
    "spectral_entropy_rank",
    "participation_ratio",
    "numerical_rank",
    "soft_rank",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 12, 5), (3, 5, 12), (3, 6, 6)]


def batch(generator, shape, dtype):
    X = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    mask = torch.rand(shape[:-1], generator=generator) > 0.3
    mask[..., :3] = True
    return X.to(dtype), mask


def center(x):
    return x - x.mean(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_those_of_the_real_tokens_alone(shape, dtype, generator):
    X, mask = batch(generator, shape, dtype)
    both = metrics.both_singular_values(X, mask)
    for b, (x, m) in enumerate(zip(X, mask, strict=True)):
        for found, of, centered in zip(both, (lambda x: x, center), (False, True), strict=True):
            expected = torch.linalg.svdvals(of(x[m].double()))
            k = len(expected)
            torch.testing.assert_close(found[b, :k], expected, rtol=1e-7, atol=1e-7)
            assert bool((found[b, k:] < 1e-6).all())
            alone = metrics.singular_values(X, mask, centered=centered)[b, :k]
            torch.testing.assert_close(alone, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RANKS)
def test_every_rank_equals_its_definition(name, shape, dtype, generator):
    X, mask = batch(generator, shape, dtype)
    eps = torch.finfo(dtype).eps
    tokens = [x[m].double() for x, m in zip(X, mask, strict=True)]
    found = getattr(metrics, name)(X, mask)
    expected = [states.ranks(x, eps=eps)[name] for x in tokens]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    found = getattr(metrics, f"centered_{name}")(X, mask)
    largest = [float(torch.linalg.svdvals(x)[0]) for x in tokens]
    expected = [states.ranks(center(x), eps=eps, largest=s)[name] for x, s in zip(tokens, largest, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_soft_rank_counts_from_tau_times_the_fair_share(tau, generator):
    X, mask = batch(generator, (2, 9, 5), torch.float32)
    expected = [states.ranks(x[m].double(), eps=0, tau=tau)["soft_rank"] for x, m in zip(X, mask, strict=True)]
    assert metrics.soft_rank(X, mask, tau=tau).tolist() == expected
    centered = [states.ranks(center(x[m].double()), eps=0, tau=tau)["soft_rank"] for x, m in zip(X, mask, strict=True)]
    assert metrics.centered_soft_rank(X, mask, tau=tau).tolist() == centered


def test_all_ranks_come_from_one_factorisation(generator):
    X, mask = batch(generator, (3, 9, 7), torch.float32)
    sigma, centered = metrics.both_singular_values(X, mask)
    of = {"tokens": mask.sum(-1), "width": 7, "dtype": X.dtype}
    for name in RANKS:
        torch.testing.assert_close(metrics.ranks(sigma, **of)[name], getattr(metrics, name)(X, mask))
        without_mean = metrics.ranks(centered, **of, largest=sigma[:, 0])[name]
        torch.testing.assert_close(without_mean, getattr(metrics, f"centered_{name}")(X, mask))


def test_a_large_mean_costs_the_centred_spectrum_no_digits(generator):
    """Centring after squaring would: float64 squares of 1e5 leave 1e-6 of tokens that differ by 1."""
    X = torch.randn(20, 8, generator=generator) + 3e4
    expected = torch.linalg.svdvals(center(X.double()))
    torch.testing.assert_close(metrics.both_singular_values(X)[1], expected, rtol=1e-9, atol=0)


def test_the_gram_product_in_float64_resolves_the_numerical_rank_of_float32_tokens(generator):
    """Directions a hundred times above the threshold of float32 count, those a hundred times below do not."""
    T, d = 40, 24
    threshold = T * torch.finfo(torch.float32).eps
    U = torch.linalg.qr(torch.randn(T, d, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    sigma = torch.ones(d, dtype=torch.float64)
    sigma[10:15] = 100 * threshold
    sigma[15:] = threshold / 100
    X = U * sigma @ V.T
    assert metrics.numerical_rank(X.float()) == 15
    assert metrics.numerical_rank(X) == d  # the same tokens in float64, whose ε lies lower
    assert metrics.numerical_rank(X.float(), torch.ones(T, dtype=torch.bool)) == 15


def test_float64_tokens_get_a_decomposition_that_squares_nothing(generator):
    """A Gram matrix would lose 1e-12 next to 1."""
    U, V = (torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 1e-12, 1e-13], dtype=torch.float64)
    found = metrics.singular_values(U * sigma @ V.T)
    torch.testing.assert_close(found, sigma, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(padded=st.integers(1, 6), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_padded_tokens_change_no_spectrum(dtype, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(7, 5, generator=generator).to(dtype)
    longer = torch.cat([X, torch.full((padded, 5), 7.0, dtype=dtype)])
    mask = torch.arange(7 + padded) < 7
    for name in RANKS:
        for prefix in ("", "centered_"):
            metric = getattr(metrics, prefix + name)
            torch.testing.assert_close(metric(longer, mask), metric(X), rtol=1e-9, atol=1e-9)


def test_a_numerical_rank_that_no_value_could_reach_is_unknown(generator):
    X = torch.randn(4, 128, generator=generator)
    assert metrics.numerical_rank(X) == 4
    assert metrics.numerical_rank(X.bfloat16()).isnan()
    assert metrics.numerical_rank(X.bfloat16()[:, :64]) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_agree_up_to_rounding_have_affine_rank_zero(dtype, generator):
    """A threshold relative to what is left would count noise."""
    X = torch.rand(9, 1, generator=generator, dtype=torch.float64) + 0.5
    X = X * torch.randn(12, generator=generator, dtype=torch.float64)
    X = (X / X.norm(dim=-1, keepdim=True)).to(dtype)
    assert metrics.centered_numerical_rank(X) == 0
    assert metrics.numerical_rank(X) == 1


def test_a_zero_state_has_rank_zero_and_no_stable_rank():
    X = torch.zeros(5, 3)
    assert metrics.numerical_rank(X) == 0
    assert metrics.soft_rank(X) == 0
    assert metrics.stable_rank(X).isnan()
    collapsed = torch.ones(5, 3)
    assert metrics.stable_rank(collapsed) == 1
    assert metrics.centered_numerical_rank(collapsed) == 0
    assert metrics.centered_stable_rank(collapsed).isnan()


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4)])
def test_the_orthogonality_gap_equals_its_definition(shape, generator):
    X, mask = batch(generator, shape, torch.float64)
    expected = [states.orthogonality_gap(x[m]) for x, m in zip(X, mask, strict=True)]
    found = metrics.orthogonality_gap(X, mask)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_isometry_gap_equals_its_definition(generator):
    X, mask = batch(generator, (3, 6, 9), torch.float64)
    expected = [states.isometry_gap(x[m]) for x, m in zip(X, mask, strict=True)]
    torch.testing.assert_close(metrics.isometry_gap(X, mask), torch.tensor(expected, dtype=torch.float64))


def test_dependent_vectors_have_an_infinite_isometry_gap(generator):
    X = torch.randn(9, 4, generator=generator)
    assert metrics.isometry_gap(X) == math.inf
    assert metrics.isometry_gap(X[:4]) < math.inf
    mask = torch.arange(9) < 4
    torch.testing.assert_close(metrics.isometry_gap(X, mask), metrics.isometry_gap(X[:4]))


def test_the_gap_of_orthogonal_vectors_is_zero_to_rounding():
    """From participation ratios it would be √ε."""
    X = torch.eye(6, 8, dtype=torch.float64)
    assert metrics.orthogonality_gap(X) < 1e-15
    assert metrics.isometry_gap(X) < 1e-15
