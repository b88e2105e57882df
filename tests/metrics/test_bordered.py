"""Two spectra from one reduction are those of two decompositions."""

import pytest
import torch
from torch.testing import assert_close

from fullrank.metrics.bordered import eigenvalues_with_and_without


def symmetric(*shape: int) -> torch.Tensor:
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return X @ X.mT


@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e8])
def test_a_shift_along_one_axis_leaves_the_rest_every_digit(n, size):
    gram = symmetric(2, n, n + 20)
    axis = size * torch.randn(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = axis[..., :, None] * axis[..., None, :]
    whole, rest = eigenvalues_with_and_without(gram, shift, axis, coupled=False)
    assert_close(whole, torch.linalg.eigvalsh(gram + shift), rtol=1e-11, atol=1e-9 * (1 + size**2) * 1e-3)
    assert_close(rest, torch.linalg.eigvalsh(gram), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_centred_tokens_with_and_without_their_mean(n, size):
    X = torch.randn(3, n, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_bar = size * torch.randn(3, 1, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    centred = X - X.mean(-2, keepdim=True)
    one = torch.ones(3, n, dtype=torch.float64)
    along = centred @ x_bar.mT
    shift = along * one[:, None] + one[..., None] * along.mT + x_bar.square().sum(-1, keepdim=True)
    whole, rest = eigenvalues_with_and_without(centred @ centred.mT, shift, one, coupled=True)
    sigma = torch.linalg.svdvals(centred + x_bar).flip(-1)
    assert_close(whole, sigma.square(), rtol=1e-9, atol=1e-12 * float(sigma.max()) ** 2)
    assert_close(rest[..., 1:], torch.linalg.svdvals(centred).flip(-1).square()[..., 1:], rtol=1e-10, atol=0)
    assert float(rest[..., 0].abs().max()) < 1e-10 * float(rest.max())
