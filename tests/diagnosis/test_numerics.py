"""Numerics: pairs of tokens lost to rounding, and the margin to the range of a dtype."""

import pytest
import torch
from depth_rows import evidence, over_depth, residuals
from transformers import GPT2Config, GPT2Model

import fullrank
from fullrank.diagnosis import Evidence
from fullrank.diagnosis.numerics import FAILURE
from fullrank.report.verdict import Severity


def found(*rows, **known):
    return FAILURE.look(evidence(*rows, **known)).suspicions


def distinct(*values, **options):
    return over_depth("distinct_at_dtype", values, **options)


def stream(rms, ratio, layers=4):
    return [*over_depth("rms", [rms] * layers), *over_depth("max_to_median", [ratio] * layers)]


def test_pairs_that_an_earlier_layer_told_apart_and_a_later_one_does_not_are_a_warning():
    (one,) = found(distinct(0.99, 1, 1, 0.9, 0.85))
    assert (one.severity, one.layers) == (Severity.WARN, (3, 4))
    assert "15.0 % of the pairs" in one.claim
    assert one.comparisons[0].against == "dtype"
    assert found(distinct(1, 1, 0.4))[0].severity is Severity.FAIL


def test_equal_words_from_the_start_are_no_loss():
    assert not found(distinct(0.9, 0.9, 0.9, 0.9))
    assert not found(distinct(0.9949, 1, 1, 1))


def test_losses_within_the_noise_are_none():
    assert not found(distinct(1, 1, 0.97, stderr=0.02))
    assert found(distinct(1, 1, 0.97, stderr=0.002))


def test_at_the_floor_nothing_is_said_of_pairs():
    assert not found(distinct(1, 1, 0), residuals([1, 1, 1e-8], floor=(2,)))


@pytest.mark.parametrize(
    ("rms", "dtype", "severity"),
    [
        (1e3, "float16", None),
        (5e3, "float16", Severity.WARN),
        (2e4, "float16", Severity.FAIL),
        (2e4, "bfloat16", None),
        (1e2, "float8_e4m3", Severity.WARN),
        (1e4, "float8_e5m2", Severity.WARN),
        (1.0, "float8_e4m3", None),
    ],
)
def test_the_largest_entry_is_held_against_the_range_of_a_named_dtype(rms, dtype, severity):
    # normal entries: the largest of 2048 is about 3.5 σ, 5.2 times the median
    suspicions = found(stream(rms, 5.2), dtypes=(dtype,))
    assert [one.severity for one in suspicions] == ([] if severity is None else [severity])
    if severity is not None:
        assert dtype in suspicions[0].claim
        assert suspicions[0].comparisons[0].against == "dtype"


def test_where_more_than_half_of_the_entries_are_nothing_their_median_says_nothing():
    assert not found(stream(1.0, float("inf")), dtypes=("float16",))


def test_the_run_s_own_dtype_is_always_held_to():
    assert found(stream(5e3, 5.2), dtype="float16")[0].severity is Severity.WARN
    assert not found(stream(5e3, 5.2))


def test_logits_are_held_to_it_too_by_head():
    logits = [
        row
        for head, value in enumerate((10.0, 7e4))
        for row in over_depth("max_logit", [value], start=3, site="attention", part="self", head=head)
    ]
    (one,) = found(logits, dtypes=("float16",))
    assert one.layers == (3,)
    assert "largest logit" in one.claim
    assert not found(logits)


@pytest.mark.parametrize("massive", [0, 1, 3])
def test_the_largest_entry_is_estimated_within_a_factor_of_two(massive):
    from fullrank.metrics import max_to_median, rms

    X = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    X[0, 0, :massive] = 3000.0
    from fullrank.diagnosis.numerics import _largest_entry

    estimated = _largest_entry(float(rms(X)), float(max_to_median(X)), X.numel())
    true = float(X.abs().max())
    assert true / 1.2 < estimated < 2 * true


def test_without_rows_it_is_unchecked():
    assert "needs a stream" in FAILURE.look(evidence([])).unchecked


def test_healthy_numbers_are_clear_with_their_margins():
    looked = FAILURE.look(evidence(distinct(1, 1, 1), stream(1.0, 5.2), dtypes=("float16",)))
    assert looked.suspicions == ()
    assert "all pairs of tokens differ in float32" in looked.clear
    assert "float16 holds" in looked.clear


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
