"""DeepScaleLM's moments against components, stacks and gradients that are really run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.golden import assert_golden
from tests.theory.random_stack import cosine, states

from fullrank.architecture import Architecture
from fullrank.errors import TheoryError
from fullrank.theory import deepscalelm as law
from fullrank.theory import deepscalelm_attention as heads
from fullrank.theory.deepscalelm_course import DEEPSCALELM, backward, forward
from fullrank.theory.deepscalelm_init import FIRST_CORRELATION, unit_moments, unit_moments_of

# ------------------------------------------------------------ sampling


class Draws:
    """Gaussian tokens, weights and dropout masks from one generator."""

    def __init__(self, seed=0, dtype=torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def weight(self, inputs, outputs, std=None):
        return self.normal(inputs, outputs) * (inputs**-0.5 if std is None else std)

    def tokens(self, count, width, r):
        return math.sqrt(r) * self.normal(1, width) + math.sqrt(1 - r) * self.normal(count, width)

    def dropped(self, x, p):
        return x * (torch.rand(x.shape, generator=self.generator, dtype=x.dtype) >= p) / (1 - p)


def square(x):
    return float(x.detach().square().mean())


def product(x):
    """Mean product of an entry between two different tokens, without the matrix of pairs."""
    x = x.detach()
    count, width = x.shape
    return float((x.sum(0).square().sum() - x.square().sum()) / (count * (count - 1) * width))


def mean_and_error(rows):
    values = np.array(rows)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def assert_met(seen, error, wanted, slack=0.0):
    wanted = np.array([float(one) for one in wanted])
    assert np.all(np.abs(seen - wanted) <= 4 * error + slack * np.abs(wanted)), (seen, error, wanted)


def attend(draws, x, s):
    """One head as wide as the stream, with values and outputs."""
    d = x.shape[1]
    logits = s * (x @ draws.weight(d, d)) @ (x @ draws.weight(d, d)).T / math.sqrt(d)
    return logits.softmax(-1) @ x @ draws.weight(d, d)


# ------------------------------------------------------------ golden numbers


def test_attention_meets_its_golden_numbers_by_law_and_by_simulation():
    r = np.array([0.2, 0.6])
    assert_golden("dslm-attention-variance", heads.attention_variance(r, tokens=64, logit_std=1.0))
    assert_golden("dslm-attention-covariance", heads.attention_covariance(r, tokens=64, order="linear"))
    draws = Draws(1)
    found = []
    for at in r.tolist():
        runs = [attend(draws, draws.tokens(64, 256, at), 1.0) for _ in range(64)]
        found.append([np.mean([square(one) for one in runs]), np.mean([product(one) for one in runs])])
    variance, covariance = zip(*found, strict=True)
    assert_golden("dslm-attention-variance", list(variance))
    assert_golden("dslm-attention-covariance", list(covariance))


# ------------------------------------------------------------ components


@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (200, 640)])
@pytest.mark.parametrize(("r", "p"), [(0.0, 0.0), (0.4, 0.2), (0.9, 0.1)])
def test_feed_forward_moments_are_those_of_simulated_layers_and_gradients(width, hidden, r, p):
    draws, q, std = Draws(2), 1.7, 0.11
    gain = width * std**2 * hidden * std**2
    found = []
    for _ in range(24):
        x = (math.sqrt(q) * draws.tokens(16, width, r)).requires_grad_()
        h = torch.relu(x @ draws.weight(width, hidden, std))
        y = draws.dropped(h @ draws.weight(hidden, width, std), p)
        g = draws.tokens(16, width, 0.5)
        (back,) = torch.autograd.grad((g * y).sum(), x)
        found.append([square(y), product(y), square(back), product(back)])
    variance = law.feed_forward_variance(q, gain=gain, dropout=p)
    returned = law.feed_forward_backward(1.0, gain=gain, dropout=p)
    r_g = law.dropout_correlation(law.relu_backward_correlation(r, gradient_correlation=0.5), dropout=p)
    wanted = variance, variance * law.feed_forward_correlation(r, dropout=p), returned, returned * r_g
    assert_met(*mean_and_error(found), wanted)


@pytest.mark.parametrize(("inputs", "outputs"), [(50, 120), (160, 40)])
def test_linear_layers_norms_relu_and_dropout_are_those_of_samples(inputs, outputs):
    draws, q, std, p = Draws(3), 2.3, 0.2, 0.3
    found = []
    for _ in range(24):
        x = (math.sqrt(q) * draws.normal(24, inputs)).requires_grad_()
        y = x @ draws.weight(inputs, outputs, std)
        g = 0.8 * draws.normal(24, outputs)
        (back,) = torch.autograd.grad((g * y).sum(), x)
        normed = torch.nn.functional.layer_norm(x, (inputs,))
        (through,) = torch.autograd.grad((0.8 * draws.normal(24, inputs) * normed).sum(), x)
        units = torch.relu(x.detach())
        found.append(
            [
                square(y),
                square(back),
                square(through) / (1 - 2 / inputs),  # two directions are projected out
                float(units.mean()),
                float(units.var()),
                square(draws.dropped(x, p)),
            ]
        )
    wanted = (
        law.linear_variance(q, std=std, inputs=inputs),
        law.linear_backward(0.64, std=std, outputs=outputs),
        law.layer_norm_backward(0.64, size=q),
        law.relu_mean(q),
        law.relu_variance(q),
        law.dropout_variance(q, dropout=p),
    )
    assert_met(*mean_and_error(found), wanted, slack=3 / inputs)  # of E 1/q over tokens


@pytest.mark.parametrize(("T", "d"), [(48, 96), (128, 192)])
@pytest.mark.parametrize(("r", "s"), [(0.0, 0.7), (0.4, 1.0)])
def test_softmax_variances_are_those_of_simulated_logits_and_their_gradients(T, d, r, s):
    draws = Draws(4)
    found = []
    for _ in range(16):
        x = draws.tokens(T, d, r)
        logits = (s * (x @ draws.weight(d, d)) @ (x @ draws.weight(d, d)).T / math.sqrt(d)).requires_grad_()
        A = logits.softmax(-1)
        (back,) = torch.autograd.grad((0.5 * draws.normal(T, T) * A).sum(), logits)
        found.append([float(A.detach().var()), square(back)])
    at = {"correlation": r, "logit_std": s, "tokens": T}
    assert_met(*mean_and_error(found), (heads.softmax_variance(**at), heads.softmax_backward(0.25, **at)), slack=4 / T)


@pytest.mark.parametrize(("T", "d"), [(64, 96), (96, 192)])
@pytest.mark.parametrize(("r", "r_g", "s"), [(0.0, 0.0, 1.0), (0.2, 0.0, 1.0), (0.2, 0.5, 0.5), (0.7, 0.3, 1.0)])
def test_attention_moments_are_those_of_simulated_heads_and_their_gradients(T, d, r, r_g, s):
    draws = Draws(5)
    found = []
    for _ in range(24):
        x = draws.tokens(T, d, r).requires_grad_()
        y = attend(draws, x, s) @ draws.weight(d, d)
        (back,) = torch.autograd.grad((draws.tokens(T, d, r_g) * y).sum(), x)
        found.append([square(y), product(y), square(back), product(back)])
    at = {"tokens": T, "logit_std": s, "width": d}
    wanted = (
        heads.attention_variance(r, **at),
        heads.attention_covariance(r, **at),
        heads.attention_backward(1.0, correlation=r, gradient_correlation=r_g, **at),
        heads.attention_backward_covariance(1.0, gradient_correlation=r_g, tokens=T),
    )
    assert_met(*mean_and_error(found), wanted, slack=0.06)


def test_values_alone_do_not_carry_the_gradient_of_attention_where_tokens_differ():
    T, d, draws = 64, 128, Draws(6)
    found = []
    for _ in range(12):
        x = draws.tokens(T, d, 0.0).requires_grad_()
        (back,) = torch.autograd.grad((draws.normal(T, d) * attend(draws, x, 1.0)).sum(), x)
        found.append(square(back))
    assert np.mean(found) > 2 * math.e / T  # e^{s²}/T of the values alone


def test_the_orders_of_attention_agree_at_small_logits_and_part_at_large_ones():
    for name in (heads.attention_variance, heads.attention_covariance):
        orders = [name(0.3, tokens=64, logit_std=0.05, order=order) for order in ("exponential", "linear", "code")]
        np.testing.assert_allclose(orders, float(orders[0]), rtol=2e-3)
        large = name(0.3, tokens=64, logit_std=np.array([1.5, 30.0]))
        assert large[0] > float(name(0.3, tokens=64, logit_std=1.5, order="linear"))
        assert large[1] <= 1.0  # no more than the values themselves, however far beyond the law
    code = heads.attention_covariance(0.1, tokens=64, logit_std=1.0, order="code")
    draws = Draws(7)
    seen, error = mean_and_error([[product(attend(draws, draws.tokens(64, 256, 0.1), 1.0))] for _ in range(64)])
    assert seen[0] + 3 * error[0] < float(code)
    assert_met(seen, error, [heads.attention_covariance(0.1, tokens=64, logit_std=1.0)])


# ------------------------------------------------------------ a model


def relu_stack(placement, width, tokens, depth, r):
    unit = width**-0.5
    return Architecture(
        depth=depth,
        width=width,
        heads=2,
        activation="relu",
        norm="none" if placement == "none" else "layernorm",
        placement=placement,
        std_q=unit * (0.4 if placement == "none" else 1.0),
        std_k=unit,
        std_v=1.1 * unit,
        std_o=unit,
        std_up=1.2 * unit,
        std_down=unit / 2,
        std_bias_up=0.1,
        context=tokens,
        correlation=r,
        attention_branch=0.6,
        mlp_branch=0.5,
    )


@pytest.mark.parametrize("placement", ["pre", "post", "none"])
@pytest.mark.parametrize(("width", "tokens", "depth", "r"), [(64, 32, 3, 0.2), (128, 48, 5, 0.5)])
def test_moments_over_depth_and_gradients_back_are_those_of_random_stacks(placement, width, tokens, depth, r):
    one = relu_stack(placement, width, tokens, depth, r)
    found = []
    for seed in range(16):
        draws = Draws(50 + seed)
        start = draws.tokens(tokens, width, r)[None].requires_grad_()
        seen = states(one, seed=seed, start=start)
        R = draws.normal(*seen[-1].shape)
        gradients = torch.autograd.grad((R * seen[-1]).sum(), [start, seen[depth // 2], seen[-2]])
        gains = [math.sqrt(square(g) / square(R)) for g in gradients]
        found.append([math.sqrt(square(seen[-1])), cosine(seen[-1].detach()), *gains])
    there, back = forward(one), backward(one)
    gains = [math.sqrt(float(back[layer].square)) for layer in (0, depth // 2, depth - 1)]
    wanted = math.sqrt(float(there[-1].square)), there[-1].correlation, *gains
    assert_met(*mean_and_error(found), wanted, slack=0.08)


def test_arrays_of_fields_are_single_architectures_side_by_side():
    one = relu_stack("pre", 64, 32, 4, 0.3)
    scale, context = np.array([0.2, 1.0, 2.0]), np.array([[16], [512]])
    states_, gradients = forward(one, residual_scale=scale, context=context), backward(one, residual_scale=scale)
    single = one.with_(residual_scale=2.0)
    assert float(forward(single.with_(context=512))[-1].square) == pytest.approx(states_[-1].square[1, 2], rel=1e-12)
    assert float(backward(single)[0].square) == pytest.approx(gradients[0].square[2], rel=1e-12)


def test_rows_stand_where_examine_puts_them_and_the_scale_of_the_loss_is_left_out():
    one = relu_stack("pre", 64, 32, 4, 0.3)
    rows = DEEPSCALELM.rows(one)
    assert {row.metric for row in rows} == set(DEEPSCALELM.gives)
    assert "gradient_rms" not in DEEPSCALELM.gives
    gains = [row.value for row in rows if (row.metric, row.site, row.part) == ("gradient_gain", "gradient", "out")]
    assert len(gains) == 5
    assert gains[-1] == 1.0
    assert gains[0] > gains[2] > 1.0


def test_it_leaves_out_what_its_components_are_not():
    one = relu_stack("pre", 64, 32, 4, 0.3)
    assert 0 < DEEPSCALELM.fit(one) < 1
    for other, why in (
        (one.with_(activation="gelu"), "gelu"),
        (one.with_(mask="causal"), "mask is causal"),
        (one.with_(qk_std=1.0), "logits are too large"),
        (one.with_(placement="peri"), "peri"),
        (one.with_(softcap=20.0), "capped at 20"),
    ):
        assert DEEPSCALELM.fit(other) == 0
        assert why in " ".join(DEEPSCALELM.reasons(other))


# ------------------------------------------------------------ the initialisation


def run_unit(made, draws, *, width, tokens, dropout, normed):
    """Mean square after half of the layers and after all, of λX + βF(X) with the standard deviations given."""

    def read(x):
        return torch.nn.functional.layer_norm(x, (width,)) if normed else x

    x, seen = draws.tokens(tokens, width, FIRST_CORRELATION), []
    for qk, vo, ffn in zip(made.qk, made.vo, made.ffn, strict=True):
        h = read(x)
        logits = (h @ draws.weight(width, width, qk)) @ (h @ draws.weight(width, width, qk)).T / math.sqrt(width)
        written = logits.softmax(-1) @ h @ draws.weight(width, width, vo) @ draws.weight(width, width, vo)
        x = made.skip * x + made.branch * draws.dropped(written, dropout)
        hidden = torch.relu(read(x) @ draws.weight(width, 4 * width, ffn))
        x = made.skip * x + made.branch * draws.dropped(hidden @ draws.weight(4 * width, width, ffn), dropout)
        seen.append(square(x))
    return seen[len(seen) // 2], seen[-1], cosine(x[None])


@pytest.mark.parametrize(("dropout", "normed"), [(0.0, True), (0.1, True), (0.1, False)])
def test_48_layers_keep_rms_one_and_the_tracked_correlation(dropout, normed):
    made = unit_moments(depth=48, width=96, dropout=dropout, tokens=48)
    draws = Draws(8, torch.float32)
    seen, error = mean_and_error(
        [run_unit(made, draws, width=96, tokens=48, dropout=dropout, normed=normed) for _ in range(16)]
    )
    np.testing.assert_allclose(np.sqrt(seen[:2]), 1.0, atol=0.06)
    assert abs(seen[2] - made.correlation[-1]) < 4 * error[2] + 0.01
    assert made.skip**2 + made.branch**2 == pytest.approx(1.0)


def test_the_papers_constants_come_out():
    d, p = 1024, 0.1
    made = unit_moments(depth=192, width=d, dropout=p, branch_square=0.005)
    assert made.skip**2 == pytest.approx(0.995)
    np.testing.assert_allclose(made.qk, 1 / math.sqrt(d))
    np.testing.assert_allclose(made.ffn, math.sqrt(math.sqrt((1 - p) / 2) / d))
    assert made.embedding == pytest.approx(math.sqrt((1 - p) / 3))
    np.testing.assert_allclose(made.vo, np.sqrt(np.sqrt((1 - p) / made.correlation[:-1]) / d), rtol=1e-12)
    r = 0.221
    for layer in range(192):
        assert made.correlation[layer] == pytest.approx(r, rel=1e-12)
        r = 0.995 * r + 0.005 * (1 - p)
        bracket = r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi
        r = 0.995 * r + 0.005 * (1 - p) * bracket


def test_an_architecture_typed_with_its_unit_moments_is_predicted_to_keep_them():
    one = relu_stack("pre", 128, 64, 24, 0.221).with_(std_bias_up=0.0)
    made = unit_moments_of(one)
    layer = 12  # an architecture has one standard deviation for all its layers
    typed = one.with_(
        qk_std=float(made.qk[layer]),
        value_std=float(made.vo[layer]),
        mlp_std=float(made.ffn[layer]),
        residual_scale=made.branch,
        skip_scale=made.skip,
    )
    assert math.sqrt(float(forward(typed)[-1].square)) == pytest.approx(1.0, abs=0.1)
    assert float(forward(one)[-1].square) > 5
    for wrong, why in (
        ({"depth": 0, "width": 8}, "depth=0"),
        ({"depth": 2, "width": 8, "correlation": 0.0}, "must share something"),
        ({"depth": 2, "width": 8, "dropout": 1.0}, "no probability below 1"),
        ({"depth": 2, "width": 8, "branch_square": 1.5}, "takes more than 0"),
    ):
        with pytest.raises(TheoryError, match=why):
            unit_moments(**wrong)
    with pytest.raises(TheoryError, match="this one is gated gelu"):
        unit_moments_of(one.with_(activation="gelu", gated=True))


def test_a_stream_that_grows_beyond_any_number_is_held_and_left_out():
    one = relu_stack("none", 128, 64, 200, 0.5).with_(mlp_std=0.6)
    assert all(np.isfinite(state.square) and np.isfinite(state.product) for state in forward(one))
    assert all(np.isfinite(state.square) for state in backward(one))
    assert DEEPSCALELM.fit(one) == 0
