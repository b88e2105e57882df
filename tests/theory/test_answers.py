"""Answers against what they are answers to: the course run deeper, attention drawn at random, both sides of a scale."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fullrank import Architecture
from fullrank.theory.answers import (
    FLOOR,
    answers,
    collapse_depth,
    critical_context,
    largest_branch,
    largest_query_std,
)
from fullrank.theory.catalogue import THEORIES
from fullrank.theory.giorlandino_goldt_course import course, final
from fullrank.theory.giorlandino_goldt_trainability import PHASES, phases

COLLAPSING = Architecture(
    depth=6, width=256, heads=4, mlp_width=0, norm="none", placement="none", context=64, std_v=0.07, std_o=0.07
)
MERGING = Architecture(depth=24, width=256, heads=4, std_v=0.09, std_o=0.09, placement="post", context=128)
CHOOSING = Architecture(depth=4, width=256, heads=4, std_q=0.08, std_k=0.08, context=256, correlation=0.1)


def answer_of(architecture, question):
    return next(one for one in answers(architecture, THEORIES) if one.question == question)


def test_there_is_an_answer_to_every_question_with_its_uncertainty_theory_and_field():
    found = list(answers(CHOOSING, THEORIES))
    assert [one.question for one in found] == ["collapse-depth", "critical-context", "residual-scale", "qk-std"]
    for one in found:
        assert one.theory == "giorlandino_goldt"
        assert one.low <= one.value <= one.high
        assert one.says
        CHOOSING.with_(**({one.field: 2} if one.field in ("depth", "context") else {one.field: 0.5}))  # a field of it


def test_without_the_theory_that_gives_them_there_are_none():
    assert list(answers(CHOOSING, [one for one in THEORIES if one.key != "giorlandino_goldt"])) == []


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_collapse_depth_is_where_the_course_run_deeper_passes_the_floor(correlation):
    one = COLLAPSING.with_(attention_skip=0.05, correlation=correlation)
    deep = course(one, depth=64).similarity
    residual = np.sqrt((1 - 1 / one.context) * np.maximum(0.0, 1 - deep))
    assert collapse_depth(one).value == np.flatnonzero(residual < FLOOR)[0]


def test_collapse_depth_is_infinite_where_tokens_stay_apart():
    one = collapse_depth(COLLAPSING.with_(value_std=0.001))
    assert one.value == math.inf
    assert "stays above 1 %" in one.says


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_from_the_critical_context_on_random_attention_passes_less_than_a_quarter_of_differences(correlation):
    one = CHOOSING.with_(correlation=correlation)
    found = critical_context(one).value
    assert 30 < found < 1500
    assert passed(one, round(found / 2)) > 0.25 > passed(one, round(found * 2))
    assert passed(one, round(found)) == pytest.approx(0.25, rel=0.15)


def passed(one, context):
    """Share of values' spread left in what softmax rows of Gaussian queries and keys average, about the mean row."""
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(3):
        shape = (context, one.head_width)
        common = math.sqrt(one.correlation)
        size = math.sqrt(one.logit_std / math.sqrt(one.head_width))  # of entries of q and of k
        own = math.sqrt(1 - one.correlation)
        q, k = (size * (own * generator.normal(size=shape) + common * generator.normal(size=shape[1])) for _ in "qk")
        logits = q[:512] @ k.T
        A = np.exp(logits - logits.max(1, keepdims=True))
        A /= A.sum(1, keepdims=True)
        shares.append(((A - A.mean(0)) ** 2).sum(1).mean())
    return math.sqrt(np.mean(shares))


def test_a_context_beyond_all_lengths_and_one_below_all():
    frozen = critical_context(CHOOSING.with_(qk_std=2.0))
    assert frozen.value == math.inf
    assert "any length" in frozen.says
    never = critical_context(CHOOSING.with_(qk_std=1e-4))
    assert never.value is None  # no number to type in
    assert "At any length" in never.says


def test_tokens_merge_on_one_side_of_the_residual_scale_and_not_on_the_other():
    found = largest_branch(MERGING)
    assert 0.01 < found.value < 100
    below, above = (
        float(final(MERGING.with_(residual_scale=factor * found.value)).similarity) for factor in (0.97, 1.03)
    )
    assert below < 0.99 < above


def test_no_residual_scale_merges_tokens_that_hardly_attend():
    assert largest_branch(Architecture(depth=4, width=256, heads=4)).value == math.inf
    gone = largest_branch(MERGING.with_(correlation=0.995))
    assert gone.value is None
    assert "keeps tokens apart" in gone.says


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"std_q": 0.2, "std_k": 0.0125},
        {"placement": "post", "input_rms": 0.03},
        {"norm": "none", "placement": "none", "input_rms": 0.3},
        {"softcap": 5.0},
        {"gated": True, "activation": "silu", "positions": "rotary", "mask": "causal"},
    ],
)
def test_the_qk_std_is_where_the_map_turns_to_frozen_whatever_the_blocks_read(changes):
    one = CHOOSING.with_(**changes)
    found = largest_query_std(one).value
    names = [PHASES[int(phases(one.with_(qk_std=factor * found)).phase)] for factor in (0.97, 1.03)]
    assert names[0] != "entropy-collapsed"
    assert names[1] == "entropy-collapsed"


def test_no_size_of_queries_and_keys_passes_a_soft_cap_that_is_low():
    one = CHOOSING.with_(softcap=1.0)
    assert largest_query_std(one).value == math.inf
    assert float(phases(one.with_(qk_std=50.0)).gauge) < math.sqrt(2)


def test_answers_typed_in_together_give_what_trains():
    one = Architecture(
        depth=24, width=256, heads=8, placement="post", std_q=0.2, std_k=0.2, std_v=1 / 16, std_o=1 / 16,
        std_up=1 / 16, std_down=1 / 32, correlation=0.2,
    )  # fmt: skip
    assert PHASES[int(phases(one).phase)] != "trainable"
    sized = one.with_(qk_std=0.97 * largest_query_std(one).value)
    scaled = sized.with_(residual_scale=0.97 * largest_branch(sized).value)
    assert PHASES[int(phases(scaled).phase)] == "trainable"


def test_where_tokens_are_alike_from_the_start_the_branches_that_part_them_are_said():
    weights = {"std_v": 0.01, "std_o": 0.01, "std_up": 0.05, "std_gate": 0.2, "std_down": 0.05}
    one = Architecture(depth=12, width=512, heads=8, gated=True, activation="silu", correlation=0.993, **weights)
    found = largest_branch(one)
    assert "Tokens are nearly alike from the start" in found.says
    scales = np.geomspace(0.01, 100, 200)
    apart = scales[final(one, residual_scale=scales).similarity < 0.99]
    assert apart[0] <= found.low <= found.high <= apart[-1]
    assert found.low == pytest.approx(apart[0], rel=1.0)  # the grid has two points in a factor of three


def test_normed_queries_and_keys_have_no_standard_deviation_to_type_in():
    one = largest_query_std(CHOOSING.with_(qk_norm=True))
    assert one.value is None


@pytest.mark.parametrize("question", ["collapse-depth", "critical-context", "residual-scale", "qk-std"])
def test_uncertainty_grows_with_the_error_of_the_correlation_and_holds_the_answer(question):
    base = {
        "collapse-depth": COLLAPSING.with_(attention_skip=0.9, correlation=0.5),
        "critical-context": CHOOSING,
        "residual-scale": MERGING.with_(correlation=0.3),
        "qk-std": CHOOSING.with_(correlation=0.3),
    }[question]
    sure, unsure = (answer_of(replace(base, correlation_stderr=error), question) for error in (0.0, 0.2))
    assert sure.value == unsure.value
    assert unsure.low <= sure.low <= sure.value <= sure.high <= unsure.high
    assert unsure.high - unsure.low > sure.high - sure.low > 0


def test_uncertainty_shrinks_with_width():
    narrow, wide = (
        largest_query_std(CHOOSING.with_(width=width, heads=4, qk_std=0.1, head_width=64)) for width in (64, 1024)
    )
    assert (narrow.high - narrow.low) / narrow.value > 2 * (wide.high - wide.low) / wide.value
