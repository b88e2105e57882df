"""The (q, p) map: the paper's curves, random networks, and what arrays and limits must agree on."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from random_stack import cosine, rotated, states

from fullrank.architecture import Architecture
from fullrank.errors import ArchitectureError, TheoryError
from fullrank.theory.giorlandino_goldt import attention_limit, cosine_map, critical_beta, giorlandino_goldt
from fullrank.theory.giorlandino_goldt_course import course, final
from fullrank.theory.giorlandino_goldt_rotary import rotary_agreement
from fullrank.theory.giorlandino_goldt_trainability import PHASES, critical, critical_skip, phases
from golden import assert_golden, golden

WIDTH = 720


def paper(
    beta: float, rho: float, *, depth: int, value_gain: float, bias: float = 0.0, context: int = 512
) -> Architecture:
    """The paper's encoder: one head, ReLU MLP of the stream's width, σ_w² = .2, σ_b² = 4e-4, post-norm."""
    return Architecture(
        depth=depth,
        width=WIDTH,
        mlp_width=WIDTH,
        activation="relu",
        placement="post",
        std_q=math.sqrt(beta * math.sqrt(math.log(context)) / WIDTH),
        std_k=math.sqrt(beta * math.sqrt(math.log(context)) / WIDTH),
        std_v=math.sqrt(value_gain / WIDTH),
        std_o=math.sqrt(1 / WIDTH),
        std_up=math.sqrt(0.2 / WIDTH),
        std_down=math.sqrt(0.2 / WIDTH),
        std_bias_up=0.02,
        std_bias_mlp=0.02,
        std_bias_attention=bias,
        context=context,
        correlation=rho,
    )


def test_the_map_in_the_limit_draws_figure_four():
    found = course(paper(0.1, 0.2, depth=100, value_gain=1.0), tokens="limit").similarity
    assert_golden("gg-fig4-post", found[[5, 10, 20, 50, 100]])


@pytest.mark.parametrize(("name", "beta"), [("gg-fig1-theory-low-beta", 0.5), ("gg-fig1-theory-high-beta", 3.0)])
def test_the_map_in_the_limit_draws_figure_one(name: str, beta: float):
    found = course(paper(beta, 0.026, depth=50, value_gain=0.2, bias=0.02), tokens="limit").similarity
    assert_golden(name, found[[0, 10, 20, 30, 40, 50]])


def test_the_critical_skip_grows_with_depth_as_in_the_golden_numbers():
    found = critical_skip(paper(0.5, 0.05, depth=6, value_gain=0.2, bias=0.02), depth=np.array([6, 12, 24, 60, 100]))
    assert_golden("gg-alpha-c", found)


@pytest.mark.parametrize(("name", "beta"), [("gg-replica-post-low-beta", 0.5), ("gg-replica-post-high-beta", 3.0)])
def test_the_map_follows_the_replica_of_the_papers_network(name: str, beta: float):
    one = replica(beta)
    layers = [5, 10, 20, 30, 40]
    simulated = np.mean([[cosine(X) for X in states(one, seed=seed)] for seed in (1, 2)], 0)
    assert_golden(name, simulated[layers])
    np.testing.assert_allclose(course(one).similarity[layers], golden(name)["expected"], atol=0.08)


def replica(beta: float) -> Architecture:
    one = paper(beta, 0.03, depth=40, value_gain=0.2, bias=0.02, context=256)
    std = math.sqrt(beta * math.sqrt(math.log(256)) / 256)
    return one.with_(
        width=256, mlp_width=256, qk_std=std, std_v=math.sqrt(0.2 / 256), std_o=1 / 16, mlp_std=math.sqrt(0.2 / 256)
    )


# ------------------------------------------------------------ random networks

BASE = {"depth": 6, "heads": 4, "mlp_width": 256, "context": 64, "correlation": 0.1, "activation": "gelu"}


def drawn(width: int, qk: float = 1.0, **fields: object) -> Architecture:
    """Weights of variance 1/fan_in; queries and keys `qk` times that."""
    std = width**-0.5
    both = {"std_q": qk * std, "std_k": qk * std, "std_v": std, "std_o": std, "std_up": std, "std_gate": std}
    return Architecture(**{"width": width, **BASE, **both, "std_down": 1 / 16, **fields})


CASES = {
    "pre": {},
    "pre, causal": {"mask": "causal"},
    "pre, sharp": {"qk": 2.0},
    "pre, sharp and causal": {"qk": 2.0, "mask": "causal"},
    "post": {"placement": "post"},
    "post, sharp": {"placement": "post", "qk": 2.0, "activation": "relu"},
    "peri": {"placement": "peri", "activation": "tanh"},
    "peri, causal": {"placement": "peri", "mask": "causal", "activation": "silu"},
    "no norm": {"placement": "none", "norm": "none", "attention_branch": 0.5, "mlp_branch": 0.5, "input_rms": 0.8},
    "gated, rms norm, grouped": {"gated": True, "activation": "silu", "norm": "rmsnorm", "key_value_heads": 2},
    "rotary, sharp": {"qk": 1.7, "positions": "rotary", "mask": "causal", "correlation": 0.4},
    "parallel": {"parallel": True, "mask": "causal"},
    "biases": {"std_bias_attention": 0.5, "std_bias_mlp": 0.3, "std_bias_up": 0.4, "activation": "relu"},
    "normed queries and keys": {"qk_norm": True, "logit_scale": 0.5},
    "capped logits": {"qk": 2.5, "softcap": 2.0},
    "attention alone": {"mlp_width": 0, "attention_skip": 1.2},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [96, 192])
def test_the_map_is_what_random_networks_do(name: str, width: int):
    one = drawn(width, **CASES[name])
    half = one.context // 2 if one.mask == "causal" else 0
    runs = [states(one, seed=seed) for seed in range(6)]
    similarity = np.array([[cosine(X[:, half:]) for X in run] for run in runs])
    size = np.array([[float(X[:, half:].square().mean()) for X in run] for run in runs])
    found = course(one)
    error = 4 * similarity.std(0) / math.sqrt(len(runs) - 1) + 0.02
    assert (abs(found.similarity - similarity.mean(0)) < error).all(), (found.similarity, similarity.mean(0))
    np.testing.assert_allclose(found.q, size.mean(0), rtol=0.15)


@pytest.mark.parametrize("name", ["pre, sharp", "pre, sharp and causal", "post, sharp"])
@pytest.mark.parametrize("width", [96, 192])
def test_centred_attention_is_what_random_networks_do(name: str, width: int):
    one = drawn(width, **CASES[name])
    half = one.context // 2 if one.mask == "causal" else 0
    runs = np.array([[cosine(X[:, half:]) for X in states(one, seed=seed, centred=True)] for seed in range(6)])
    found = course(one, centred=True)
    error = 4 * runs.std(0) / math.sqrt(len(runs) - 1) + 0.02
    assert (abs(found.similarity - runs.mean(0)) < error).all(), (found.similarity, runs.mean(0))
    assert found.similarity[-1] < course(one).similarity[-1]


def test_in_the_limit_gain_control_takes_the_common_part_of_attention_away():
    one = paper(3.0, 0.2, depth=1, value_gain=0.7).with_(mlp_width=0, placement="pre")
    Y2 = 1 - math.sqrt(2 / 0.8) / 3
    assert course(one, tokens="limit", centred=True).similarity[-1] == pytest.approx(0.2 / (1 + 0.7 * 0.8 * Y2))
    low = paper(0.5, 0.2, depth=1, value_gain=0.7).with_(mlp_width=0, placement="pre")
    assert course(low, tokens="limit", centred=True).similarity[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(("tokens", "width"), [(20, 32), (300, 64)])
def test_rotary_positions_turn_equal_keys_apart(tokens: int, width: int):
    shared = np.random.default_rng(0).standard_normal((2, 4000, 1, width))
    q, k = (rotated(torch.tensor(np.broadcast_to(one, (4000, tokens, width)).copy())).numpy() for one in shared)
    row = np.einsum("nd,nsd->ns", q[:, -1], k) / math.sqrt(width)
    kept = 1 - row.var(1).mean()  # of a variance that is 1 for independent keys
    assert rotary_agreement(tokens) == pytest.approx(kept, abs=0.05)


# ------------------------------------------------------------ arrays, depth, limits


def test_a_map_of_arrays_is_the_same_as_loops():
    one = drawn(64, mask="causal", activation="silu", gated=True)
    fields = {
        "residual_scale": np.array([[0.2], [1.0]]),
        "qk_std": np.array([0.05, 0.2, 0.4]),
        "context": np.array([[16], [300]]),
        "heads": np.array([2, 4, 8]),
        "depth": np.array([1, 3, 6]),
    }
    together = final(one, **fields)
    course_together = course(one, **{name: fields[name] for name in ("residual_scale", "qk_std")})
    for i, j in np.ndindex(2, 3):
        values = {name: np.broadcast_to(value, (2, 3))[i, j].item() for name, value in fields.items()}
        alone = final(one.with_(**values))
        assert together.similarity[i, j] == pytest.approx(alone.similarity, abs=1e-9)
        assert together.q[i, j] == pytest.approx(alone.q)
        single = course(one, residual_scale=values["residual_scale"], qk_std=values["qk_std"])
        np.testing.assert_allclose(course_together.similarity[i, j], single.similarity, atol=1e-9)


def test_the_last_of_the_course_is_the_final_state():
    one = drawn(64, placement="peri")
    assert final(one).similarity == course(one).similarity[-1]
    assert course(one).similarity.shape == (one.depth + 1,)
    assert course(one, qk_std=np.ones((2, 1)), std_up=np.ones(3)).q.shape == (2, 3, one.depth + 1)


def test_memory_of_the_final_state_does_not_grow_with_depth():
    def peak(depth: int) -> int:
        tracemalloc.start()
        final(drawn(64, depth=depth), qk_std=np.linspace(0.01, 0.2, 2000))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # tables are made once
    assert peak(64) < 1.1 * peak(4)


def test_a_window_as_wide_as_the_context_cuts_nothing_off():
    one = drawn(64, mask="causal", qk=1.5)
    assert final(one, window=one.context).similarity == final(one).similarity
    assert final(one, window=8).similarity != final(one).similarity


def test_many_tokens_without_sharp_logits_reach_the_limit():
    one = drawn(64, qk=0.02, context=2_000_000)
    np.testing.assert_allclose(course(one).similarity, course(one, tokens="limit").similarity, atol=1e-4)


def test_the_critical_temperature_and_the_cosine_map_are_the_papers():
    assert critical_beta(1.0, 0.0) == pytest.approx(math.sqrt(2))
    assert critical_beta(1.0, 0.5) == pytest.approx(2.0)
    np.testing.assert_allclose(cosine_map([0.5, 0.5], [1.0, 4.0]), [1.0, 0.5 / (1 - 1 / 4)])
    q, p = attention_limit(2.0, 1.0, 0.25, value_gain=0.5)
    assert (q, p) == (pytest.approx(0.625), pytest.approx(0.5))


def test_fields_that_are_none_or_do_not_broadcast_are_refused():
    one = drawn(64)
    with pytest.raises(ArchitectureError, match="'qk_strength' is no field"):
        final(one, qk_strength=np.ones(3))
    with pytest.raises(TheoryError, match=r"qk_std|std_q \(3,\)"):
        final(one, qk_std=np.ones(3), std_v=np.ones(2))
    with pytest.raises(ArchitectureError, match="std_v=-1"):
        final(one, std_v=np.array([1.0, -1.0]))
    with pytest.raises(TheoryError, match="cannot vary"):
        final(one, placement=np.array(["pre", "post"]))


# ------------------------------------------------------------ phases


def test_phases_name_collapse_of_rank_of_entropy_and_neither():
    found = phases(
        drawn(256, placement="post", depth=48, context=512, mlp_width=1024),
        qk_std=np.array([0.06, 0.06, 0.3]),
        attention_skip=np.array([1.0, 10.0, 10.0]),
    )
    assert [PHASES[one] for one in found.phase] == ["rank-collapsed", "trainable", "entropy-collapsed"]
    assert found.gauge[2] > math.sqrt(2) > found.gauge[0]


def test_a_stream_that_overflows_is_unbounded():
    one = drawn(64, placement="none", norm="none", depth=400, activation="relu", std_up=9.0)
    assert PHASES[int(phases(one).phase)] == "unbounded"


def test_at_the_critical_value_the_last_layer_has_the_threshold():
    one = drawn(64, placement="post", depth=12)
    for name in ("residual_scale", "attention_skip"):
        value = critical(one, name, similarity=0.8)
        assert final(one, **{name: value}).similarity == pytest.approx(0.8, abs=1e-4)
    assert np.isnan(critical(one, "std_bias_mlp", similarity=0.05))


# ------------------------------------------------------------ the theory's rows


def test_rows_have_the_places_and_scopes_that_examine_gives():
    one = drawn(64, mask="causal", depth=3)
    rows = giorlandino_goldt.rows(one)
    similarity = {(row.layer, row.part, row.scope): row.value for row in rows if row.metric == "similarity"}
    expected = course(one).similarity
    assert [similarity[layer, "out", "late"] for layer in range(4)] == pytest.approx(expected)
    assert set(similarity) == {(0, "out", s) for s in ("all", "late")} | {
        (layer, part, s) for layer in (1, 2, 3) for part in ("mid", "out") for s in ("all", "late")
    }
    assert {row.metric for row in rows} == set(giorlandino_goldt.gives)
    assert {row.source for row in rows} == {"theory:giorlandino_goldt"}
    assert {row.stack for row in rows} == {"decoder"}


def test_full_attention_has_no_late_tokens_and_a_parallel_block_no_state_between():
    rows = giorlandino_goldt.rows(drawn(64, parallel=True, depth=2))
    assert {row.scope for row in rows} == {"all"}
    assert {row.part for row in rows if row.site == "stream"} == {"out"}


def test_fit_ranks_before_measuring_and_batch_norm_is_left_out():
    wide, narrow = drawn(256), drawn(64, heads=16)
    assert 1 > giorlandino_goldt.fit(wide) > giorlandino_goldt.fit(narrow) > 0
    batch = drawn(64, norm="batchnorm")
    assert giorlandino_goldt.fit(batch) == 0
    assert giorlandino_goldt.reasons(batch) == ("its norm is taken over the batch",)


def test_the_error_of_the_first_correlation_is_carried_through_the_layers():
    one = drawn(64, mask="causal", depth=3, correlation=0.2)
    uncertain = giorlandino_goldt.rows(one.with_(correlation_stderr=0.01))
    moved = giorlandino_goldt.rows(one.with_(correlation=0.21))
    for row, other, certain in zip(uncertain, moved, giorlandino_goldt.rows(one), strict=True):
        assert row.value == pytest.approx(certain.value)
        assert certain.stderr is None
        assert (row.stderr or 0.0) == pytest.approx(abs(other.value - row.value), abs=1e-12)


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "none"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_rows_of_extreme_architectures_are_finite_and_in_range(placement: str, mask: str):
    norm = "none" if placement == "none" else "rmsnorm"
    shares = {"residual", "token_energy", "inverse_participation", "normalized_entropy"}
    for size, std, window in ((2, 0.0, None), (2**22, 3.0, None), (512, 1e-6, 1), (40, 30.0, 5)):
        one = drawn(64, placement=placement, norm=norm, mask=mask, depth=60, context=size, window=window)
        one = one.with_(qk_std=std, mlp_std=std, input_rms=1e4, correlation=1.0, mlp_skip=0.0, qk_norm=window == 1)
        for row in giorlandino_goldt.rows(one):
            assert math.isfinite(row.value)
            assert row.metric not in shares or -1e-9 <= row.value <= 1 + 1e-6
            assert row.metric != "similarity" or abs(row.value) <= 1 + 1e-9
