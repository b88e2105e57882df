"""The critical multiplier of log n, against softmax attention over tokens on a simplex."""

import math

import numpy as np
import pytest

from fullrank.errors import TheoryError
from fullrank.theory.log_context import critical_logit_scale, critical_multiplier, rescaled_for_context


def weight_on_itself(rho: float, gamma: float, tokens: int) -> float:
    """Of softmax(γ log n · cosine) over unit tokens of equal cosines, from the tokens themselves."""
    common, own = math.sqrt(rho), math.sqrt(1 - rho)
    X = np.concatenate([np.full((tokens, 1), common), own * np.eye(tokens)], 1)
    A = np.exp(gamma * math.log(tokens) * (X[0] @ X.T))
    return float(A[0] / A.sum())


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
def test_above_the_critical_multiplier_a_token_sees_itself_and_below_it_everyone(rho: float):
    gamma = float(critical_multiplier(rho))
    assert gamma == pytest.approx(1 / (1 - rho))
    for factor, share in ((0.8, 0.0), (1.0, 0.5), (1.2, 1.0)):
        short, long = (weight_on_itself(rho, factor * gamma, tokens) for tokens in (100, 1500))
        assert abs(long - share) <= abs(short - share) + 1e-12
        assert long == pytest.approx(share, abs=0.26)


def test_the_critical_logit_is_that_multiple_of_log_n():
    np.testing.assert_allclose(critical_logit_scale([0.0, 0.5], 1024), [math.log(1024), 2 * math.log(1024)])
    assert critical_logit_scale(1.0, 8) == math.inf


def test_extending_the_context_scales_cosines_and_random_logits_by_their_own_laws():
    assert rescaled_for_context(1024, 1024**2) == pytest.approx(2)
    assert rescaled_for_context(1024, 1024**2, logits="random") == pytest.approx(math.sqrt(2))


def test_what_no_tokens_can_be_is_refused():
    with pytest.raises(TheoryError, match="cosines between -1 and 1"):
        critical_multiplier(1.5)
    with pytest.raises(TheoryError, match="2 tokens or more"):
        rescaled_for_context(1, 100)
    with pytest.raises(TheoryError, match="cosines, random"):
        rescaled_for_context(10, 100, logits="learned")
