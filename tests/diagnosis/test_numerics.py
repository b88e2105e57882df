"""Numerics: pairs of tokens lost to rounding, and the margin to the range of a dtype."""

import pytest
import torch
from depth_rows import evidence, over_depth, residuals
from transformers import GPT2Config, GPT2Model

import fullrank
from fullrank.diagnosis import Evidence, sinks
from fullrank.diagnosis.numerics import FAILURE
from fullrank.report.verdict import Severity


def found(*rows, **known):
    return FAILURE.look(evidence(*rows, **known)).suspicions


def distinct(*values, **options):
    return over_depth("distinct_at_dtype", values, **options)


def stream(*largest):
    return over_depth("max_abs", largest, start=1)


def logits(*largest, layer=3):
    rows = (over_depth("max_logit", [value], site="attention", part="self", start=layer, head=head)
            for head, value in enumerate(largest))  # fmt: skip
    return [row for some in rows for row in some]


def test_pairs_that_an_earlier_layer_told_apart_and_a_later_one_does_not_are_a_warning():
    (one,) = found(distinct(0.99, 1, 1, 0.9, 0.85))
    assert (one.severity, one.layers) == (Severity.WARN, (3, 4))
    assert "15.0 % of the pairs" in one.claim
    assert one.comparisons[0].against == "dtype"
    assert found(distinct(1, 1, 0.4))[0].severity is Severity.FAIL


def test_what_is_lost_is_a_share_of_the_pairs_that_differed_and_not_of_all():
    (one,) = found(distinct(0.4, 0.5, 0.2))  # half of all pairs are of equal words
    assert (one.severity, one.layers, one.exceeded) == (Severity.FAIL, (2,), True)
    assert "up to 60.0 % of the pairs of tokens that differed before" in one.claim
    (one,) = found(distinct(0.5, 0.5, 0.48))
    assert one.severity is Severity.WARN
    assert "up to 4.00 %" in one.claim
    assert not found(distinct(0.5, 0.5, 0.4951))  # a hundredth of what differed, half a hundredth of all
    assert found(distinct(0.5, 0.5, 0.4949))


def test_equal_words_from_the_start_are_no_loss():
    assert not found(distinct(0.9, 0.9, 0.9, 0.9))
    assert not found(distinct(0.9949, 1, 1, 1))


def test_losses_within_the_noise_are_none():
    assert not found(distinct(1, 1, 0.97, stderr=0.02))
    assert found(distinct(1, 1, 0.97, stderr=0.002))


def test_at_the_floor_nothing_is_said_of_pairs():
    assert not found(distinct(1, 1, 0), residuals([1, 1, 1e-8], floor=(2,)))


@pytest.mark.parametrize(
    ("largest", "dtype", "severity"),
    [
        (16_000, "float16", None),
        (17_000, "float16", Severity.WARN),
        (66_000, "float16", Severity.WARN),  # just beyond
        (130_000, "float16", Severity.WARN),
        (132_000, "float16", Severity.FAIL),  # twice
        (132_000, "bfloat16", None),
        (400, "float8_e4m3", Severity.WARN),
        (1e4, "float8_e4m3", Severity.WARN),  # scaled before it is cast
        (1e6, "float8_e5m2", Severity.WARN),
        (3.0, "float8_e4m3", None),
    ],
)
def test_the_largest_entry_is_held_against_the_range_of_a_named_dtype(largest, dtype, severity):
    suspicions = found(stream(1.0, largest, 1.0), dtypes=(dtype,))
    assert [one.severity for one in suspicions] == ([] if severity is None else [severity])
    if severity is not None:
        (one,) = suspicions
        assert dtype in one.claim
        assert (one.layers, one.exceeded) == ((2,), True)
        assert [(held.metric, held.value, held.against) for held in one.comparisons] == [("max_abs", largest, "dtype")]


@pytest.mark.parametrize("rows", [stream(1.0, 60_000), stream(1.0, 65_504), logits(1.0, 64_000), logits(7e4, 1e6)])
def test_a_run_that_stayed_finite_is_no_failure_in_its_own_dtype(rows):
    (one,) = found(rows, dtype="float16")
    assert one.severity is Severity.WARN
    assert not found(rows)


def test_layers_that_are_only_near_are_not_named_beside_those_that_are_beyond():
    (one,) = found(stream(20_000, 70_000, 140_000, 30_000), dtypes=("float16",))
    assert (one.severity, one.layers) == (Severity.FAIL, (2, 3))
    (one,) = found(stream(20_000, 1.0, 30_000), dtypes=("float16",))
    assert (one.severity, one.layers) == (Severity.WARN, (1, 3))


def test_logits_are_held_to_it_too_by_head_and_are_a_warning_since_kernels_keep_them_wider():
    (one,) = found(logits(10.0, 1e6), dtypes=("float16",))
    assert (one.severity, one.layers) == (Severity.WARN, (3,))
    assert "largest logit" in one.claim
    assert not found(logits(10.0, 1e6))


def massive(size=2e5, *, at=0.0, rests_on=0.0, ratio=5000.0):
    """A stream whose largest entries stand in the token at a position, and a head that rests on one."""
    held = {"max_abs": (1.0, size, size), "max_to_median": (9.0, ratio, ratio), "max_abs_position": (7.0, at, at)}
    of_head = {
        "sink_mass": 0.9,
        "sink_position": rests_on,
        "selectivity": 0.3,
        "normalized_entropy": 0.3,
        "entropy": 1.04,
    }
    return [
        *(row for metric, values in held.items() for row in over_depth(metric, values, start=1)),
        *(
            row
            for metric, value in of_head.items()
            for row in over_depth(metric, [value], start=3, site="attention", part="self", head=0)
        ),
    ]


def test_what_does_not_fit_is_told_once_by_sinks_where_it_is_a_sink_s_and_else_here():
    known = {"dtypes": ("float16",)}
    alone = [massive(at=4.0), massive(ratio=50.0), [row for row in massive() if row.metric != "max_abs_position"]]
    for rows in alone:
        (one,) = found(rows, **known)
        assert (one.severity, one.layers) == (Severity.FAIL, (2, 3))
        assert "massive" not in str(sinks.FAILURE.look(evidence(rows, **known)))
    looked = FAILURE.look(evidence(massive(), **known))
    assert looked.suspicions == ()
    assert "the largest entry of the stream is 1.00" in looked.clear
    _, told = sinks.FAILURE.look(evidence(massive(), **known)).suspicions
    assert (told.severity, told.layers) == (Severity.WARN, (2, 3))
    both = [*massive(), *over_depth("max_abs", [2e5], start=4)]  # a later layer's are of another token
    assert [one.layers for one in found(both, **known)] == [(4,)]


def test_what_is_near_the_range_is_told_here_whosever_it_is():
    (one,) = found(massive(6e4), dtypes=("float16",))
    assert (one.severity, one.layers) == (Severity.WARN, (2, 3))


def test_without_rows_it_is_unchecked():
    assert "needs a stream" in FAILURE.look(evidence([])).unchecked


def test_healthy_numbers_are_clear_with_their_margins():
    looked = FAILURE.look(evidence(distinct(1, 1, 1), stream(1.0, 5.2), dtypes=("float16",)))
    assert looked.suspicions == ()
    assert "all pairs of tokens differ in float32" in looked.clear
    assert "the largest entry of the stream is 5.20 (float16 holds" in looked.clear


def gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2Model(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=32)).eval()


def examined(model):
    batch = {"input_ids": torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(0))}
    return Evidence.of(
        fullrank.examine(model, batch, spectrum=False, reference=False), weights="trained", dtypes=("float16",)
    )


@pytest.mark.parametrize(("scale", "overflows"), [(1.0, False), (1e8, True)])
def test_values_scaled_until_float16_overflows_are_found_at_that_layer(scale, overflows):
    model = gpt2()
    with torch.no_grad():
        model.h[1].attn.c_attn.weight[:, 64:].mul_(scale)
    evidence = examined(model)
    looked = FAILURE.look(evidence)
    largest = []
    with torch.no_grad():
        ids = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(0))
        largest = [float(X.abs().max()) for X in model(ids, output_hidden_states=True).hidden_states]
    assert (max(largest[:-1]) > torch.finfo(torch.float16).max) == overflows
    assert [one.layers for one in looked.suspicions] == ([(2, 3)] if overflows else [])
    assert all(one.severity is Severity.FAIL for one in looked.suspicions)
    for row in evidence.course("max_abs", "decoder", site="stream", part="out").values():
        assert row.layer == 3 or row.value == pytest.approx(largest[row.layer], rel=1e-5)  # transformers norms the last
