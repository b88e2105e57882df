"""Random Markov ensembles: what random-matrix theory says of them, and the golden numbers of Mind the Gap."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fullrank.errors import ShapeError
from fullrank.metrics import gram_stable_rank
from fullrank.operators import DenseAttention, Full
from fullrank.operators.krylov import leading_singular_values
from fullrank.operators.linear import Matrix
from fullrank.operators.markov import exponential_markov, gaussian_logit_markov, lognormal_markov
from fullrank.operators.spectra import attention_spectra
from golden import assert_golden

ENSEMBLES = {
    "lognormal": lognormal_markov,
    "exponential": exponential_markov,
    "gaussian logits": lambda tokens, **options: gaussian_logit_markov(tokens, 1.0, **options),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def isometric(tokens, g):
    return torch.linalg.qr(torch.randn(tokens, tokens, generator=g, dtype=torch.float64)).Q


def markov(tokens, g, **options):
    return lognormal_markov(tokens, generator=g, dtype=torch.float64, **options)


def gaussian(tokens, g):
    return torch.randn(tokens, tokens, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("ensemble", ENSEMBLES.values(), ids=ENSEMBLES.keys())
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_probabilities_and_causal_ones_see_no_later_key(ensemble, causal, dtype):
    A = ensemble(40, generator=generator(), lead=(2, 3), causal=causal, dtype=dtype)
    assert A.shape == (2, 3, 40, 40)
    assert A.dtype == dtype
    assert bool((A >= 0).all())
    assert_close(A.sum(-1), torch.ones(2, 3, 40, dtype=dtype))
    assert torch.equal(A.triu(1), torch.zeros_like(A)) == causal
    assert not torch.equal(A[0, 0], A[1, 1])


@pytest.mark.parametrize("ensemble", ENSEMBLES.values(), ids=ENSEMBLES.keys())
def test_equal_seeds_give_equal_matrices_and_the_global_generator_is_not_drawn_from(ensemble):
    state = torch.random.get_rng_state()
    assert torch.equal(ensemble(20, generator=generator(3)), ensemble(20, generator=generator(3)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_entry_variance_of_gaussian_logits_is_exp_of_their_variance_less_one(std):
    A = gaussian_logit_markov(1500, std, generator=generator(), dtype=torch.float64)
    assert_close(float(A.square().sum()) - 1, math.exp(std**2) - 1, rtol=0.1, atol=0)


def test_zero_logits_give_uniform_attention():
    A = gaussian_logit_markov(7, 0.0, generator=generator())
    assert_close(A, torch.full((7, 7), 1 / 7))


def test_large_logits_stay_finite():
    A = gaussian_logit_markov(50, 300.0, generator=generator())
    assert bool(A.isfinite().all())
    assert_close(A.sum(-1), torch.ones(50))


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_an_impossible_deviation_is_answered_in_a_sentence(std):
    with pytest.raises(ShapeError, match="expected a finite number"):
        gaussian_logit_markov(5, std, generator=generator())


def test_no_tokens_are_answered_in_a_sentence():
    with pytest.raises(ShapeError, match="at least 1"):
        lognormal_markov(0, generator=generator())


def edge(A):
    T = A.shape[-1]
    found = attention_spectra(DenseAttention(A[None, None], visible=Full()), tolerance=1e-4)
    s1, s2 = found.s[0, 0].tolist()
    lambda2 = float(torch.linalg.eigvals(A).abs().sort().values[-2])
    root = math.sqrt(T)
    return s1, [s2 * root, lambda2 * root, float(found.uniform_distance) * root, float(A.square().sum())]


def test_lognormal_rows_have_one_outlier_and_a_bulk_of_the_predicted_edge():
    s1, numbers = edge(markov(1000, generator()))
    assert_golden("mtg-iid-lognormal-s1", s1)
    assert_golden("mtg-iid-lognormal-edge", numbers)


def test_exponential_rows_have_one_outlier_and_a_bulk_of_the_predicted_edge():
    s1, numbers = edge(exponential_markov(1000, generator=generator(), dtype=torch.float64))
    assert_golden("mtg-iid-exponential-edge", [s1, *numbers])


def test_key_query_attention_has_a_heavier_edge_than_independent_logits():
    T, found = 150, []
    for seed in range(5):
        g = generator(seed)
        X, W_Q, W_K = isometric(T, g), gaussian(T, g), gaussian(T, g)
        A = (X @ W_Q @ W_K.mT @ X.mT / math.sqrt(T)).softmax(-1)
        s = torch.linalg.svdvals(A)
        found.append([float(s[0]), float(s[1]) * math.sqrt(T), float((A - 1 / T).square().sum())])
    assert_golden("mtg-kq-normal-spectrum", torch.tensor(found, dtype=torch.float64).mean(0))


def test_causal_averaging_amplifies_what_all_tokens_share():
    found = []
    for T in (50, 1000):
        # a single draw of T = 50 scatters by 5 %
        A = markov(T, generator(), causal=True, lead=(16,) if T == 50 else (1,))
        found.append(float(leading_singular_values(Matrix(A), 1, tolerance=1e-4).singular_values.mean()))
    assert_golden("mtg-causal-s1", found)


def collapse(T, layers, g, *, centred=False):
    """Gram stable rank after each of the layers X ↦ (A − J or A) X W."""
    X, found = isometric(T, g), []
    for _ in range(layers):
        A = markov(T, g)
        X = (A - 1 / T if centred else A) @ X @ gaussian(T, g)
        found.append(float(gram_stable_rank(X)))
    return torch.tensor(found, dtype=torch.float64)


def test_rank_collapses_in_width_with_the_predicted_constants():
    T = 400
    ranks = torch.stack([collapse(T, 3, generator(seed)) for seed in range(5)]).mean(0)
    powers = torch.tensor([float(T) ** (2 * layer - 1) for layer in (1, 2, 3)], dtype=torch.float64)
    assert_golden("mtg-width-collapse-constant", (ranks - 1) * powers)


def test_rank_collapses_in_width_with_the_predicted_exponents_at_equal_variance():
    # sr − 1 ≃ (1 + 2ℓ) σ^4ℓ T^(1 − 2ℓ), and σ² = ‖A‖_F² − 1 itself grows with T, from .90 at T = 50 to .98 at T = 400:
    # left in, it flattens the slopes to −.85 and −2.75 (means of 20 seeds)
    sizes, logs = (50, 100, 200, 400), []
    for T in sizes:
        variance = markov(T, generator(100), lead=(20,)).square().sum((-2, -1)).mean() - 1
        ranks = torch.stack([collapse(T, 2, generator(seed)) for seed in range(10)]).mean(0)
        logs.append(((ranks - 1) / torch.stack([variance**2, variance**4])).log().numpy())
    assert_golden("mtg-width-collapse-slope", np.polyfit(np.log(sizes), np.stack(logs), 1)[0])


def test_without_the_outlier_the_rank_is_that_of_a_product_of_gaussians():
    T = 400
    ranks = torch.stack([collapse(T, 4, generator(seed), centred=True) for seed in range(5)]).mean(0)
    assert_golden("mtg-fix-fuss-catalan", ranks / T)


def late_ranks(centred):
    found = []
    for T in (64, 256, 1024):
        ranks = []
        for seed in range(4):
            g = generator(seed)
            A = markov(T, g, causal=True)
            if centred:
                A = A - torch.ones_like(A).tril_() / torch.arange(1, T + 1, dtype=A.dtype)[:, None]
            # X is isometric and square: A X W is A times a Gaussian matrix in distribution
            ranks.append(float(gram_stable_rank((A @ gaussian(T, g))[T // 2 :])))
        found.append(sum(ranks) / len(ranks))
    return found


def test_late_queries_of_causal_attention_collapse_in_width():
    assert_golden("mtg-causal-late", late_ranks(centred=False))


def test_late_queries_of_causal_attention_without_the_running_mean_do_not():
    assert_golden("mtg-causal-late-centred", late_ranks(centred=True))
