"""The null line of a profile: the same observer on Gaussian tokens of the same shape."""

import pytest

from fullrank import metrics
from fullrank.measure import gaussian_nulls
from fullrank.measure.stream import StackShape


def test_nulls_agree_with_the_closed_forms():
    found = gaussian_nulls(StackShape(tokens=64, width=128, sequences=8), causal=False)
    for metric in ("shared_energy", "sequence_energy", "token_energy"):
        assert found[metric] == metrics.null_value(metric, tokens=64, width=128, sequences=8)[0]
    for metric in ("rms", "residual", "centered_stable_rank", "participation_ratio"):
        mean, _ = metrics.null_value(metric, tokens=64, width=128, sequences=8)
        assert found[metric] == pytest.approx(mean, rel=0.05), metric
    assert found["similarity"] == pytest.approx(0, abs=0.01)
    assert found["update_share"] == pytest.approx(2**0.5, rel=0.02)  # two unrelated states


def test_causal_nulls_are_of_the_late_half_where_the_metric_is_taken_there():
    whole = gaussian_nulls(StackShape(tokens=32, width=48, sequences=4), causal=False)
    late = gaussian_nulls(StackShape(tokens=64, width=48, sequences=4), causal=True)
    everything = gaussian_nulls(StackShape(tokens=64, width=48, sequences=4), causal=False)
    for metric in ("residual", "centered_stable_rank", "token_energy"):
        assert late[metric] == pytest.approx(whole[metric], rel=0.1), metric
    assert late["token_energy"] == whole["token_energy"]
    # only ever taken over all tokens
    for metric in ("neighbourhood_overlap", "channel_entropy", "max_to_median", "max_abs"):
        assert late[metric] == everything[metric], metric
    assert "max_abs_position" not in late  # any place is as likely
    assert "span_novelty" not in late  # 64 tokens may span all 48 features
    assert "span_novelty" in whole


def test_a_single_token_has_no_null():
    assert gaussian_nulls(StackShape(tokens=1, width=4, sequences=1), causal=False) == {}
