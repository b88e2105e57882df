"""An architecture refuses what no transformer can be, reads like a sentence, and derives numbers that hold."""

import dataclasses
import math

import numpy as np
import pytest

import fullrank
from fullrank.architecture.shorthands import SHORTHANDS
from fullrank.errors import ArchitectureError

Architecture = fullrank.Architecture
SMALL = {"depth": 6, "width": 64, "heads": 4}


def small(**more):
    return Architecture(**(SMALL | more))


REFUSALS = {
    "depth": [0, -1, 1.5, True, "six"],
    "width": [0, 2.5],
    "heads": [0, 1.0],
    "key_value_heads": [0, 2.0],
    "head_width": [0],
    "mlp_width": [-1, 0.5],
    "activation": ["swish", 3],
    "gated": [1, "yes"],
    "norm": ["instancenorm"],
    "placement": ["before"],
    "parallel": [0],
    "attention_branch": [math.nan, math.inf, "1", True],
    "mlp_skip": [math.nan],
    "std_q": [-0.02, math.nan, "0.02"],
    "std_bias_mlp": [-1.0],
    "dropout": [-0.1, 1.0],
    "softcap": [0.0, -1.0],
    "window": [0, 1.5],
    "context": [1, 0, 512.0],
    "correlation": [1.5, -2.0, math.nan],
    "correlation_stderr": [-1.0, 1.01],
    "input_rms": [0.0, -1.0],
    "mask": ["prefix"],
    "positions": ["absolute"],
    "name": [3],
    "qk_norm": [None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, many in REFUSALS.items() for value in many])
def test_an_impossible_value_is_refused_in_one_sentence_that_names_it(field, value):
    with pytest.raises(ArchitectureError) as refusal:
        small(**{field: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"{field}={value!r} must be ")
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"heads": 5}, ("heads=5", "width=64")),
        ({"key_value_heads": 3}, ("key_value_heads=3", "heads=4")),
        ({"norm": "none"}, ("norm='none'", "placement='pre'")),
        ({"placement": "none"}, ("norm='layernorm'", "placement='none'")),
        ({"context": 4, "correlation": -0.5}, ("correlation=-0.5", "-1/3")),
    ],
)
def test_values_that_do_not_go_together_are_refused(values, names):
    with pytest.raises(ArchitectureError) as refusal:
        small(**values)
    assert all(name in str(refusal.value) for name in names)


def test_it_takes_no_positional_arguments_and_no_unknown_fields():
    with pytest.raises(TypeError):
        Architecture(6, 64)
    with pytest.raises(TypeError):
        small(colour="red")


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().depth = 7


def test_equal_values_are_equal_architectures():
    assert small() == small(head_width=16, mlp_width=256, key_value_heads=4)
    assert len({small(), small(), small(depth=7)}) == 2


def test_what_is_left_out_follows_from_the_rest():
    one = small()
    assert (one.key_value_heads, one.head_width, one.mlp_width) == (4, 16, 256)
    assert one.logit_scale == 0.25
    assert (one.stack, small(mask="causal").stack, small(stack="vision").stack) == ("encoder", "decoder", "vision")


def test_a_width_that_heads_do_not_divide_needs_a_head_width():
    assert Architecture(depth=1, width=10, heads=3, head_width=4).head_width == 4


@pytest.mark.parametrize("shorthand", SHORTHANDS)
def test_a_shorthand_sets_every_field_that_it_stands_for_and_no_other(shorthand):
    before, after = dataclasses.asdict(small()), dataclasses.asdict(small().with_(**{shorthand: 0.3}))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(SHORTHANDS[shorthand])
    assert {after[name] for name in changed} == {0.3}


def test_a_name_that_is_no_field_is_answered_with_those_there_are():
    with pytest.raises(ArchitectureError, match=r"'deth' is no field .* residual_scale, .*depth, width"):
        small().with_(deth=3)


def test_other_values_are_checked_as_the_first_were():
    with pytest.raises(ArchitectureError, match="std_q"):
        small().with_(qk_std=-1.0)


def test_tokens_that_oppose_each_other_oppose_each_other_less_in_a_longer_context():
    one = small(context=8, correlation=-0.1)
    assert one.with_(context=5).correlation == -0.1
    assert one.with_(context=np.int64(65)).correlation == -1 / 64
    assert small(context=8, correlation=0.3).with_(context=65).correlation == 0.3
    with pytest.raises(ArchitectureError, match=r"correlation=-0.1 is impossible among 65 tokens"):
        one.with_(context=65, correlation=-0.1)
    for context in (1, 0, "65", 65.0, True):
        with pytest.raises(ArchitectureError, match="context="):
            one.with_(context=context)


def test_what_followed_from_width_and_heads_follows_the_new_ones():
    one = small().with_(width=128, heads=8)
    assert (one.head_width, one.mlp_width, one.key_value_heads, one.logit_scale) == (16, 512, 8, 0.25)
    chosen = small(mlp_width=100, logit_scale=1.0, key_value_heads=2).with_(width=128)
    assert (chosen.head_width, chosen.mlp_width, chosen.key_value_heads, chosen.logit_scale) == (32, 100, 2, 1.0)


def test_it_reads_like_a_sentence():
    one = small(name="toy", mask="causal", gated=True, activation="silu", norm="rmsnorm", key_value_heads=2)
    said = str(one)
    assert said.startswith(
        "toy: 6 blocks of width 64, 4 heads of 16 (2 of keys and values), pre-RMSNorm, gated silu MLP"
    )
    assert "causal attention over 512 tokens" in said and "\n" not in said


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mlp_width": 0}, "no MLP"),
        ({"parallel": True}, "6 parallel blocks"),
        ({"norm": "none", "placement": "none"}, "no norm"),
        ({"placement": "peri"}, "peri-LayerNorm"),
        ({"placement": "res-post", "norm": "rmsnorm"}, "res-post-RMSNorm"),
        ({"window": 16}, "window 16"),
        ({"positions": "none"}, "no positions"),
        ({"attention_branch": 0.5}, "branches times 0.5 and 1"),
        ({"attention_skip": 0.5, "mlp_skip": 0.5}, "skips times 0.5"),
        ({"qk_norm": True}, "q and k normalised"),
        ({"softcap": 50.0}, "logits bounded at 50"),
        ({"correlation": 0.25, "correlation_stderr": 0.01}, "token correlation 0.25 ± 0.01"),
        ({"depth": 1, "heads": 1}, "1 block of width 64, 1 head of 64"),
    ],
)
def test_the_sentence_says_what_is_particular(values, words):
    assert words in str(small(**values))


# ---------------------------------------------------------------- derived numbers, against random matrices


SIZES = pytest.mark.parametrize(("width", "heads", "head_width"), [(64, 4, 16), (160, 5, 24)])


def draws(width, heads, head_width, stds, seed):
    """W_Q, W_K, W_V of every head, (heads, head width, width), and W_O, (heads, width, head width)."""
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(0, std, (heads, head_width, width)) for std in stds[:3])
    return q, k, v, random.normal(0, stds[3], (heads, width, head_width))


@SIZES
def test_value_gain_is_the_variance_of_what_attention_writes_of_equal_tokens(width, heads, head_width):
    one = Architecture(depth=1, width=width, heads=heads, head_width=head_width, std_v=0.07, std_o=0.11)
    squares = []
    for seed in range(200):
        _, _, V, W_O = draws(width, heads, head_width, (1, 1, 0.07, 0.11), seed)
        x = np.random.default_rng(seed + 1000).normal(size=width)
        x /= np.sqrt((x**2).mean())
        squares.append(((W_O @ (V @ x)[..., None]).sum(0) ** 2).mean())
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - one.value_gain) < 4 * error
    assert error < 0.05 * one.value_gain


@SIZES
@pytest.mark.parametrize("scale", [None, 0.5])
def test_logit_std_is_that_of_logits_between_independent_tokens(width, heads, head_width, scale):
    one = Architecture(
        depth=1, width=width, heads=heads, head_width=head_width, std_q=0.05, std_k=0.13, logit_scale=scale
    )
    logits = []
    for seed in range(100):
        Q, K, _, _ = draws(width, heads, head_width, (0.05, 0.13, 1, 1), seed)
        X = np.random.default_rng(seed + 1000).normal(size=(width, 8))
        X /= np.sqrt((X**2).mean(0))
        scores = np.einsum("hdt,hds->hts", Q @ X, K @ X) * (head_width**-0.5 if scale is None else scale)
        logits.append((scores[:, ~np.eye(8, dtype=bool)] ** 2).mean())
    error = np.std(logits) / math.sqrt(len(logits))
    assert abs(np.mean(logits) - one.logit_std**2) < 4 * error
    assert error < 0.05 * one.logit_std**2


@SIZES
def test_with_queries_and_keys_normalised_the_logits_do_not_depend_on_their_weights(width, heads, head_width):
    one = Architecture(depth=1, width=width, heads=heads, head_width=head_width, qk_norm=True, logit_scale=0.3)
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(20000, head_width)) for _ in "qk")
    q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (q, k))
    assert np.std(0.3 * (q * k).sum(-1)) == pytest.approx(one.logit_std, rel=0.03)
    assert one.with_(qk_std=7.0).logit_std == one.logit_std


@pytest.mark.parametrize(
    ("values", "visible"),
    [({}, 512), ({"mask": "causal"}, 384), ({"window": 100}, 100), ({"mask": "causal", "window": 4096}, 384)],
)
def test_the_gauge_is_held_against_the_keys_that_a_late_query_sees(values, visible):
    one = small(**values)
    assert one.visible == visible
    assert one.gauge == pytest.approx(one.logit_std / math.sqrt(math.log(visible)))


def test_three_quarters_of_the_keys_are_what_late_queries_of_a_causal_mask_see_on_average():
    seen = np.arange(1, 513)
    assert small(mask="causal").visible == pytest.approx(seen[256:].mean(), rel=2e-3)
