"""Carried scores as one attention call: the recursions, the concatenation, and what is lost where they are cut off."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from fullrank.remedies.attention.carried_scores import coefficients, concatenated, left_out, needed, steps

RULES = {
    "average from zero": {"rule": "average", "keeps": 0.3},
    "average from the first": {"rule": "average", "keeps": 0.7, "start": "first"},
    "sum": {"rule": "sum"},
    "mean": {"rule": "mean"},
}


def by_recursion(name, scores):
    """The scores of the last layer, from the papers' recursions one layer after the other."""
    if name == "sum":
        return torch.stack(scores).sum(0)
    if name == "mean":
        return torch.stack(scores).mean(0)
    keeps = RULES[name]["keeps"]
    h = scores[0] if name == "average from the first" else (1 - keeps) * scores[0]
    for s in scores[1:]:
        h = keeps * h + (1 - keeps) * s
    return h


def drawn(dtype, *, layers=5, heads=4, key_heads=4, tokens=33, widths=None):
    g = torch.Generator().manual_seed(2)
    chosen = widths or [8] * layers
    q = [torch.randn(2, heads, tokens, d, generator=g, dtype=dtype) for d in chosen]
    k = [torch.randn(2, key_heads, tokens, d, generator=g, dtype=dtype) for d in chosen]
    return q, k, torch.randn(2, key_heads, tokens, chosen[-1], generator=g, dtype=dtype)


def explicit(name, q, k, v, *, causal):
    groups = q[0].shape[1] // v.shape[1]
    k, v = [one.repeat_interleave(groups, 1) for one in k], v.repeat_interleave(groups, 1)
    h = by_recursion(name, [one @ other.mT * one.shape[-1] ** -0.5 for one, other in zip(q, k, strict=True)])
    if causal:
        h = h.masked_fill(torch.ones(h.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(h, -1) @ v


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_call_is_attention_by_carried_scores(name, causal, key_heads, dtype, atol):
    q, k, v = drawn(dtype, key_heads=key_heads)
    counts = coefficients(steps(5, **RULES[name]))
    Q, K = concatenated(q, k, [c * 8**-0.5 for c in counts], 8**-0.5)
    V = functional.pad(v, (0, Q.shape[-1] - v.shape[-1]))
    one_call = functional.scaled_dot_product_attention(
        Q, K, V, is_causal=causal, scale=8**-0.5, enable_gqa=key_heads != 4
    )
    wanted = explicit(name, q, k, v, causal=causal)
    torch.testing.assert_close(one_call[..., :8], wanted, rtol=0, atol=atol)
    assert not one_call[..., 8:].any()


def test_layers_of_different_widths_and_scales_and_negative_weights_go_together():
    q, k, _ = drawn(torch.float64, widths=[4, 8, 6, 8, 2])
    weights = [0.5, -1.25, 0.0, 2.0, 0.1]
    Q, K = concatenated(q, k, weights, 0.7)
    assert Q.shape[-1] == K.shape[-1] == 4 + 8 + 8 + 2
    wanted = sum(c * one @ other.mT for c, one, other in zip(weights, q, k, strict=True))
    torch.testing.assert_close(0.7 * Q @ K.mT, wanted, rtol=0, atol=1e-12)


def test_a_layer_by_itself_is_handed_on_untouched():
    q, k, _ = drawn(torch.float64, layers=2)
    Q, K = concatenated(q, k, [0.0, 0.25], 0.25)
    assert Q is q[1]
    assert K is k[1]
    Q, K = concatenated(q, k, [0.0, 0.0], 0.25)
    assert not (Q @ K.mT).any()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_coefficients_are_those_of_the_recursion(name, layers):
    unit = list(torch.eye(layers, dtype=torch.float64))
    wanted = by_recursion(name, unit)
    torch.testing.assert_close(torch.tensor(coefficients(steps(layers, **RULES[name])), dtype=torch.float64), wanted)


@pytest.mark.parametrize("keeps", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", ["zero", "first"])
def test_of_an_average_what_lies_m_layers_back_counts_at_most_its_mth_power(keeps, start):
    for layers, m in itertools.product(range(1, 12), range(1, 12)):
        counts = coefficients(steps(layers, "average", keeps=keeps, start=start))
        assert left_out(counts, m) <= keeps**m + 1e-12
        assert left_out(counts, m) == pytest.approx(1 - sum(counts[-m:]) if start == "first" else sum(counts[:-m]))
    assert left_out(counts, None) == 0


def test_the_least_number_of_layers_within_a_tolerance_is_kept():
    counts = coefficients(steps(20, "average", keeps=0.5))
    assert needed(counts, 0.0) == 20
    assert needed(counts, 1.0) == 1
    m = needed(counts, 1e-3)
    assert left_out(counts, m) <= 1e-3 < left_out(counts, m - 1)
    assert m == 10


def map_error(left, largest):
    """How far a row of the map can move: what is left out changes its scores by values within 2εS of each other, two
    keys' odds by at most that, and the distance is largest where two sets of keys share the row evenly."""
    return math.tanh(left * largest / 2)


def test_cut_off_layers_move_no_row_beyond_the_bound():
    q, k, v = drawn(torch.float64, layers=6)
    counts = coefficients(steps(6, "average", keeps=0.6))
    scores = [one @ other.mT * 8**-0.5 for one, other in zip(q, k, strict=True)]
    whole = sum(c * s for c, s in zip(counts, scores, strict=True)).softmax(-1)
    for m in range(1, 6):
        cut = sum(c * s for c, s in zip(counts[-m:], scores[-m:], strict=True)).softmax(-1)
        largest = max(float(s.abs().max()) for s in scores[:-m])
        bound = map_error(left_out(counts, m), largest)
        assert 0 < float((whole - cut).abs().sum(-1).max()) / 2 <= bound
        diameter = float((v[..., None, :] - v[..., None, :, :]).norm(dim=-1).max())
        assert float(((whole - cut) @ v).norm(dim=-1).max()) <= bound * diameter


def test_the_bound_is_attained():
    left, S = 0.3, 2.0
    omitted = left * torch.tensor([S, -S], dtype=torch.float64)
    kept = -omitted / 2  # two keys whose odds turn around
    moved = ((kept + omitted).softmax(-1) - kept.softmax(-1)).abs().sum() / 2
    assert float(moved) == pytest.approx(map_error(left, S), rel=1e-12)
