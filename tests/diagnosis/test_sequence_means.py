"""Means of the real tokens of a sequence; what is padded, NaN included, neither counts nor changes."""

import pytest
import torch

from fullrank.diagnosis.sequence_means import sequence_means

REAL = torch.tensor([[False, True, True, True], [True, True, False, False]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(), (5,)])
def test_padded_tokens_stay_as_they_are(causal, heads, generator):
    X = torch.randn(2, *heads, 4, 3, generator=generator)
    padded = ~REAL.reshape(2, *([1] * len(heads)), 4, 1).expand_as(X)
    X[padded] = torch.nan
    X[0, ..., 0, 0] = 7.0
    Y = sequence_means(X, REAL, causal=causal)
    assert torch.equal(Y[padded].nan_to_num(-1), X[padded].nan_to_num(-1))
    assert Y[~padded].isfinite().all()


def test_the_mean_runs_along_where_attention_is_causal():
    X = torch.tensor([[[9.0], [1.0], [3.0], [8.0]], [[2.0], [4.0], [9.0], [9.0]]])
    assert sequence_means(X, REAL)[..., 0].tolist() == [[9, 4, 4, 4], [3, 3, 9, 9]]
    assert sequence_means(X, REAL, causal=True)[..., 0].tolist() == [[9, 1, 2, 4], [2, 3, 9, 9]]
    assert sequence_means(X)[..., 0].tolist() == [[5.25] * 4, [6.0] * 4]


def test_half_precision_is_added_up_in_float32():
    X = torch.full((1, 4096, 1), 1.001, dtype=torch.float16)
    assert torch.equal(sequence_means(X), X)
    assert torch.equal(sequence_means(X, causal=True), X)
