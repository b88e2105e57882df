"""The contract of every metric: it is described, it keeps to its range, and it is blind to what it declares to be."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fullrank.metrics as metrics
from fullrank.metrics import VOCABULARY
from oracles.worlds import CHANGES, take, world

NAMES = tuple(VOCABULARY)
BLIND = [(name, change) for name in NAMES for change in sorted(VOCABULARY[name].invariances)]
SEEING = [
    ("rms", "scale"),
    ("channel_entropy", "rotation"),
    ("max_to_median", "rotation"),
    ("max_abs", "rotation"),
    ("max_abs", "scale"),
    ("max_abs_position", "token_permutation"),
    ("similarity_standardized", "rotation"),
    ("gradient_rms", "scale"),
    ("elasticity", "scale"),
    ("sink_position", "token_permutation"),
]
worlds = st.builds(
    world,
    st.integers(0, 10_000),
    size=st.sampled_from([1e-6, 1.0, 1e5]),
    shift=st.sampled_from([0.0, 0.5, 30.0]),
    sharpness=st.sampled_from([1e-3, 1.0, 8.0]),
)


def test_the_vocabulary_holds_every_metric_of_states_and_attention_and_no_other():
    spectral = {
        "stable_rank",
        "gram_stable_rank",
        "effective_rank",
        "spectral_entropy_rank",
        "participation_ratio",
        "numerical_rank",
        "soft_rank",
    }
    states = {
        "rms",
        "similarity",
        "similarity_across",
        "similarity_standardized",
        "residual",
        "shared_energy",
        "sequence_energy",
        "token_energy",
        "intrinsic_dimension",
        "identity_distance",
        "span_novelty",
        "update_share",
        "neighbour_cosine",
        "neighbourhood_overlap",
        "channel_entropy",
        "max_to_median",
        "max_abs",
        "max_abs_position",
        "distinct_at_dtype",
        "orthogonality_gap",
        "isometry_gap",
    }
    attention = {
        "attention_s1",
        "attention_s2",
        "outlier_share",
        "bulk_excess",
        "attention_stable_rank",
        "uniform_distance",
        "smoothing_gain",
        "branch_energy",
        "contrast_gain",
        "entropy",
        "normalized_entropy",
        "effective_keys",
        "selectivity",
        "inverse_participation",
        "logit_std",
        "log_context_gauge",
        "max_logit",
        "sink_mass",
        "sink_position",
        "head_similarity",
        "nearest_head_similarity",
        "nearest_head",
        "head_ambiguity",
        "unselectable_keys",
    }
    gradients = {
        "gradient_rms",
        "gradient_gain",
        "gradient_norm",
        "elasticity",
        "elasticity_ratio",
        "query_key_to_value_output",
        "gradient_heterogeneity",
        "angle_exponent",
        "gradient_exponent",
    }
    weights = {
        "weight_rms",
        "condensation",
        "spectral_norm",
        "weight_stable_rank",
        "weight_effective_rank",
        "qk_eigenvalue_variance",
        "value_output_sign",
    }
    outputs = {"token_loss"}
    ours = outputs | spectral | {f"centered_{name}" for name in spectral} | states | attention | gradients | weights
    assert set(NAMES) == ours


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_all_that_a_reader_must_know(name):
    entry = VOCABULARY[name]
    assert entry.name == name
    for field in ("definition", "unit", "healthy", "collapsed", "null", "source", "cost"):
        assert getattr(entry, field).strip(), field
    assert len(entry.definition) > 30
    assert entry.range[0] < entry.range[1]
    assert entry.per_head <= (entry.level in ("attention", "weight"))
    assert callable(getattr(metrics, name))
    assert getattr(metrics, name).__doc__


def test_the_vocabulary_cannot_be_changed():
    with pytest.raises(TypeError):
        VOCABULARY["rms"] = VOCABULARY["similarity"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        VOCABULARY["rms"].unit = "volts"


def test_every_public_name_can_be_imported():
    for name in metrics.__all__:
        assert hasattr(metrics, name)


@pytest.mark.parametrize("name", NAMES)
@given(w=worlds)
@settings(deadline=None, max_examples=8)
def test_a_metric_keeps_to_its_range(name, w):
    low, high = VOCABULARY[name].range
    found = take(name, w)
    slack = 1e-9
    known = found[~found.isnan()]
    assert bool(((known >= low - slack) & (known <= high + slack)).all()), found


@pytest.mark.parametrize(("name", "change"), BLIND)
@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=6)
def test_a_metric_is_blind_to_what_it_declares(name, change, seed):
    w = world(seed, shift=0.3)
    before, after = take(name, w), take(name, CHANGES[change](w, seed))
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("name", "change"), SEEING)
def test_a_metric_that_does_not_declare_an_invariance_sees_the_change(name, change):
    w = world(3, shift=0.3)
    assert not torch.allclose(take(name, CHANGES[change](w, 5)), take(name, w))


@pytest.mark.parametrize("name", [name for name in NAMES if VOCABULARY[name].level == "token"])
def test_a_batch_is_measured_sequence_by_sequence(name):
    w = world(1)
    whole = take(name, w)
    alone = dataclasses.replace(w, X=w.X[1:], X_previous=w.X_previous[1:], X_0=w.X_0[1:], mask=w.mask[1:])
    torch.testing.assert_close(take(name, alone), whole[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if VOCABULARY[name].level != "attention"])
def test_measuring_draws_nothing_from_the_global_generator_and_changes_no_input(name):
    w = world(2)
    kept = {field.name: getattr(w, field.name).clone() for field in dataclasses.fields(w)}
    state = torch.get_rng_state()
    take(name, w)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(w, field), before) for field, before in kept.items())


def test_attention_metrics_draw_nothing_from_the_global_generator():
    w = world(2)
    state = torch.get_rng_state()
    for name in NAMES:
        if VOCABULARY[name].level == "attention":
            take(name, w)
    metrics.permuted_null("attention_s2", w.A, w.visible)
    metrics.null_value("stable_rank", tokens=5, width=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_floor_grows_with_the_coarseness_of_the_dtype():
    floors = [metrics.floor(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert floors == sorted(floors)
    assert floors[1] == pytest.approx(1e-6, rel=0.1)
    assert all(0 < level < 0.1 and math.isfinite(level) for level in floors)
