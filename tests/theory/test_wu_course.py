"""Similarity and residual of uniform attention over layers against random networks of attention that are really run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fullrank import metrics
from fullrank.architecture import Architecture
from fullrank.theory.wu_masks_layernorm_course import WU_MASKS_LAYERNORM, uniform_course


def architecture(**changed):
    base = {"depth": 5, "width": 256, "heads": 2, "context": 24, "mlp_width": 0, "attention_skip": 0.0}
    return Architecture(**{**base, "norm": "none", "placement": "none", **changed})


@pytest.mark.parametrize("count", [9, 33])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 5), (True, 4)])
@pytest.mark.parametrize("late", [False, True])
def test_the_course_is_that_of_the_gram_matrix_by_loops(count, causal, window, late):
    weights = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            back = i - j
            near = window is None or (back < window if causal else abs(back) <= window // 2)
            weights[i, j] = near and (back >= 0 or not causal)
    weights /= weights.sum(1, keepdims=True)
    rho = np.array([0.0, 0.4])
    similarity, residual = uniform_course(count, 4, correlation=rho, causal=causal, window=window, late=late)
    assert similarity.shape == residual.shape == (5, 2)
    kept = range(count // 2 if late else 0, count)
    for column, value in enumerate(rho):
        gram = (1 - value) * np.eye(count) + value
        for layer in range(5):
            one = gram[np.ix_(kept, kept)]
            cosines = one / np.sqrt(np.outer(np.diag(one), np.diag(one)))
            off = cosines[~np.eye(len(one), dtype=bool)].mean()
            apart = np.sqrt(max(0.0, 1 - one.mean() / np.diag(one).mean()))
            assert similarity[layer, column] == pytest.approx(off, abs=1e-9)
            assert residual[layer, column] == pytest.approx(apart, abs=1e-7)
            gram = weights @ gram @ weights.T


@pytest.mark.parametrize(
    "changed",
    [
        {"mask": "causal"},
        {"mask": "causal", "context": 40, "window": 6, "depth": 8},
        {"window": 4},
        {"mask": "causal", "mlp_width": 512, "activation": "identity", "mlp_skip": 0.5},
    ],
)
def test_rows_are_the_metrics_of_random_networks(changed):
    one = architecture(**changed)
    one = one.with_(std_v=0.06, std_o=0.06, std_up=0.05, std_down=0.05)
    assert WU_MASKS_LAYERNORM.fit(one) > 0.9
    rows = {(row.metric, row.scope, row.layer): row.value for row in WU_MASKS_LAYERNORM.rows(one)}
    draws = [run(one, seed) for seed in range(12)]
    for layer in range(one.depth + 1):
        stream = torch.cat([draw[layer] for draw in draws]).double()
        for scope, start in (("all", 0), ("late", one.context // 2)) if one.mask == "causal" else (("all", 0),):
            seen = stream[:, start:]
            for name, metric in (("similarity", metrics.similarity), ("residual", metrics.residual)):
                each = metric(seen).reshape(12, 2).mean(1)  # of one network: its two sequences share its weights
                error = float(each.std()) / 12**0.5
                assert abs(rows[name, scope, layer] - float(each.mean())) < 4 * error + 0.003


def run(one, seed):
    """States of a random network of attention, with a linear MLP where it has one, on independent tokens."""
    generator = torch.Generator().manual_seed(seed)

    def through(x, rows, columns, std):
        return std * x @ torch.randn(rows, columns, generator=generator)

    back = torch.arange(one.context)[:, None] - torch.arange(one.context)
    reach = one.context if one.window is None else one.window
    mask = (back >= 0) & (back < reach) if one.mask == "causal" else back.abs() <= reach // 2
    x = torch.randn(2, one.context, one.width, generator=generator)
    found = [x]
    for _ in range(one.depth):
        written = torch.zeros_like(x)
        for _ in range(one.heads):
            q, k, v = (through(x, one.width, one.head_width, std) for std in (one.std_q, one.std_k, one.std_v))
            logits = (one.logit_scale * q @ k.mT).masked_fill(~mask, -torch.inf)
            written += through(logits.softmax(-1) @ v, one.head_width, one.width, one.std_o)
        x = written
        if one.mlp_width:
            hidden = through(x, one.width, one.mlp_width, one.std_up)
            x = one.mlp_skip * x + through(hidden, one.mlp_width, one.width, one.std_down)
        found.append(x)
    return found


def test_the_uncertainty_of_the_start_is_carried_through_every_layer():
    one = architecture(mask="causal", correlation=0.2, correlation_stderr=0.05)
    rows = [row for row in WU_MASKS_LAYERNORM.rows(one) if (row.metric, row.scope) == ("similarity", "late")]
    for row in rows:
        ends = [uniform_course(24, row.layer, correlation=at, causal=True, late=True)[0][-1] for at in (0.15, 0.25)]
        assert row.stderr == pytest.approx((ends[1] - ends[0]) / 2)
    assert rows[0].stderr == pytest.approx(0.05)
    assert all(row.stderr is None for row in WU_MASKS_LAYERNORM.rows(architecture()))


def test_a_full_mask_costs_the_same_at_any_length_and_others_are_left_out_where_they_are_too_long():
    one = architecture(context=40_000, norm="layernorm", placement="post", correlation=0.2)  # N² numbers: 13 GB
    assert WU_MASKS_LAYERNORM.fit(one) > 0
    rows = {(row.layer, row.metric): row.value for row in WU_MASKS_LAYERNORM.rows(one)}
    assert rows[0, "similarity"] == 0.2
    assert rows[0, "residual"] == pytest.approx(0.8**0.5, rel=1e-4)
    assert all(rows[layer, "similarity"] == 1 and rows[layer, "residual"] == 0 for layer in range(1, 6))
    assert WU_MASKS_LAYERNORM.fit(one.with_(context=1024, mask="causal")) > 0
    for changed in ({"mask": "causal"}, {"window": 16}):
        long = one.with_(context=1025, **changed)
        assert WU_MASKS_LAYERNORM.fit(long) == 0
        assert WU_MASKS_LAYERNORM.reasons(long) == ("its context is too long to follow token by token",)


def test_a_window_as_wide_as_the_context_is_none():
    wide, none = (uniform_course(9, 3, correlation=0.3, window=window) for window in (16, None))
    assert np.array_equal(wide, none)
    assert not np.array_equal(uniform_course(9, 3, correlation=0.3, window=15), none)


@pytest.mark.parametrize("count", [8, 60])
def test_where_all_tokens_cancel_the_course_is_the_limit(count):
    for late in (False, True):
        least, near = (
            uniform_course(count, 3, correlation=-share / (count - 1), causal=True, late=late)
            for share in (1, 1 - 1e-7)
        )
        assert np.allclose(least, near, atol=2e-3)


def test_two_tokens_have_no_late_rows():
    assert {row.scope for row in WU_MASKS_LAYERNORM.rows(architecture(mask="causal", context=2))} == {"all"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"attention_skip": 1.0}, "a skip of strength 1.0 leads past its attention"),
        ({"parallel": True, "mlp_width": 64}, "leads past its attention"),
        ({"attention_branch": 0.0, "attention_skip": 0.0}, "leads past its attention"),
        ({"positions": "alibi"}, "its logits are far from equal"),
        ({"std_q": 1.0, "std_k": 1.0}, "its logits are far from equal"),
        # without a norm tokens grow from layer to layer, and their logits with them
        ({"std_v": 0.2, "std_o": 0.2}, "its logits are far from equal"),
        ({"norm": "batchnorm", "placement": "post"}, "its norm is batchnorm, taken over tokens"),
    ],
)
def test_it_says_why_it_has_nothing_to_say(changed, reason):
    one = architecture(**changed)
    assert WU_MASKS_LAYERNORM.fit(one) == 0
    assert any(reason in said for said in WU_MASKS_LAYERNORM.reasons(one))


def test_it_fits_less_well_where_norms_or_nonlinear_units_stand():
    best = WU_MASKS_LAYERNORM.fit(architecture())
    for changed in (
        {"norm": "layernorm", "placement": "pre"},
        {"mlp_width": 64, "activation": "relu"},
        {"std_bias_mlp": 0.1},
        {"std_q": 0.05, "std_k": 0.05},
    ):
        assert 0 < WU_MASKS_LAYERNORM.fit(architecture(**changed)) < best
