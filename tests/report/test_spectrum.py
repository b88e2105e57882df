"""The bulk that the scree plot draws is the one that random rows have."""

import math
from itertools import pairwise

import pytest
import torch

from fullrank.report import HeadSpectrum
from fullrank.report.spectrum import quarter_circle


def spectrum_of(A):
    values = torch.linalg.svdvals(A)
    return HeadSpectrum(
        "encoder", 1, "self", 0, tuple(values.tolist()), len(A), True, None, float((A**2).sum(-1).mean())
    )


def test_quarter_circle_quantiles_integrate_to_the_second_moment_of_the_law():
    quantiles = quarter_circle(2000)
    assert all(a > b for a, b in pairwise(quantiles))
    assert 0 < quantiles[-1] < quantiles[0] < 1
    assert sum(s * s for s in quantiles) / 2000 == pytest.approx(0.25, abs=1e-4)  # ∫ s² (4/π)√(1 − s²) ds


def test_independent_random_rows_fill_the_quarter_circle_up_to_the_edge(generator):
    T = 400
    A = torch.softmax(0.5 * torch.randn(T, T, generator=generator, dtype=torch.float64), -1)
    spectrum = spectrum_of(A)
    assert spectrum.values[1] == pytest.approx(spectrum.edge, rel=0.03)
    drawn = [spectrum.edge * quantile for quantile in quarter_circle(T - 1)]
    assert max(abs(a - b) for a, b in zip(drawn, spectrum.values[1:], strict=True)) < 0.03 * spectrum.edge


def test_uniform_rows_have_no_bulk():
    spectrum = spectrum_of(torch.full((8, 8), 1 / 8, dtype=torch.float64))
    assert spectrum.edge == pytest.approx(0, abs=1e-7)


def test_every_value_of_the_identity_after_the_first_is_inside_its_edge_or_counted():
    spectrum = spectrum_of(torch.eye(16, dtype=torch.float64))
    assert spectrum.edge == pytest.approx(2 * math.sqrt(1 - 1 / 16))
    assert spectrum.outliers == 0
