"""Vanishing or exploding: beyond the reference by orders of magnitude, of the stream and of its gradient."""

import math

import pytest
import torch
from depth_rows import evidence, over_depth, residuals
from transformers import GPT2Config, GPT2LMHeadModel

import fullrank
from fullrank.diagnosis import Evidence
from fullrank.diagnosis.vanishing import FAILURE
from fullrank.report.verdict import Severity

ROOT = [math.sqrt(1 + layer) for layer in range(7)]  # a pre-norm stream


def sizes(*values, **options):
    return over_depth("rms", values, **options)


def gains(*values, **options):
    return over_depth("gradient_gain", values, site="gradient", **options)


def found(*rows, **known):
    return FAILURE.look(evidence(*rows, **known)).suspicions


def test_a_step_of_orders_of_magnitude_is_named_at_its_block():
    (one,) = found(sizes(1, 1.2, 1.4, 7e4, 7e4, 7e4, 8e4), weights="fresh")
    assert one.layers == (3,)
    assert one.severity is Severity.WARN
    assert "in block 3" in one.claim
    assert one.comparisons[0].against == "null"


def test_steady_growth_is_named_over_all_its_blocks_with_its_rate():
    (one,) = found(sizes(*[10.0**layer for layer in range(8)]), weights="fresh")
    assert one.layers == tuple(range(1, 8))
    assert one.severity is Severity.FAIL
    assert "10.0 a layer" in one.claim


def test_a_stream_that_dies_out_is_found():
    (one,) = found(sizes(*[0.1**layer for layer in range(7)]), weights="fresh")
    assert one.severity is Severity.WARN
    assert "less than" in one.claim


def test_growth_like_the_root_of_depth_is_healthy_at_any_depth():
    assert not found(sizes(*[math.sqrt(1 + layer) for layer in range(2000)]), weights="fresh")


def test_trained_weights_are_held_against_their_initialisation():
    drawn = sizes(*ROOT, source="initialisation")
    assert not found(sizes(*[5 * one for one in ROOT]), drawn)
    assert not found(sizes(1, 5, 20, 40, 80, 120, 200), drawn)
    (one,) = found(sizes(1, 5, 20, 400, 8e3, 1.2e4, 2e4), drawn)
    assert one.severity is Severity.WARN
    assert one.comparisons[0].against == "initialisation"
    assert one.comparisons[0].ratio == pytest.approx(2e4 / ROOT[6])


def test_the_initialisation_s_own_jump_is_no_fault():
    jump = sizes(1e-4, 1, 1, 1, 1, 1, 1, source="initialisation")
    assert not found(sizes(1e-4, 1, 1, 1, 1, 1, 1), jump)


def test_embeddings_much_smaller_than_what_blocks_write_are_no_fault_of_fresh_weights():
    assert not found(sizes(1e-4, 0.9, 0.9, 1.0), weights="fresh")
    assert found(sizes(1e-4, 2e3, 2e3, 2e3), weights="fresh")


def test_a_stream_that_begins_at_nothing_is_read_from_the_first_block_on():
    assert not found(sizes(0.0, 0.9, 0.9, 1.0), gains(0.0, 0.1, 0.9, 1.0), weights="fresh")
    assert found(sizes(0.0, 1.0, 1e4, 1e4), weights="fresh")[0].layers == (2,)


def test_a_token_that_begins_at_nothing_has_a_gradient_beyond_measure_and_no_fault():
    assert not found(sizes(*[1.0] * 4), gains(5e3, 1.2, 1.1, 1.0), weights="fresh")
    (one,) = found(sizes(*[1.0] * 4), gains(5e3, 4e3, 1.1, 1.0), weights="fresh")
    assert one.layers == (2,)


def test_what_is_nothing_at_initialisation_is_no_reference():
    nothing = sizes(0.0, 1, 1, 1, source="initialisation")
    assert not found(sizes(0.02, 1, 1, 1), nothing)
    (one,) = found(sizes(0.02, 1, 1e5, 1e5), nothing)
    assert one.layers == (2,)


def test_without_a_reference_trained_weights_get_a_note():
    (one,) = found(sizes(1, 1, 1, 1e8))
    assert one.severity is Severity.NOTE


def test_a_gradient_that_dies_out_is_found_where_it_dies():
    (one,) = found(sizes(*[1.0] * 7), gains(1e-5, 1e-5, 1e-5, 0.9, 0.9, 1.0, 1.0), weights="fresh")
    assert one.layers == (3,)
    assert one.comparisons[0].metric == "gradient_gain"


def test_a_gradient_that_falls_as_the_stream_grows_is_as_it_should_be():
    growing = [1.0, 10.0, 100.0, 2000.0]
    drawn = sizes(*growing, source="initialisation")
    gradient = gains(*[2000 / one for one in growing])
    looked = FAILURE.look(evidence(sizes(*growing), drawn, gradient))
    assert looked.suspicions == ()
    assert not looked.unchecked


def test_a_gradient_that_never_arrives_is_a_failure():
    (one,) = found(sizes(*[1.0] * 4), gains(0.0, 0.0, 1.0, 1.0), weights="fresh")
    assert one.severity is Severity.FAIL
    assert one.layers == (2,)


def test_without_gradients_the_signal_is_still_looked_at_and_the_rest_unchecked():
    healthy = FAILURE.look(evidence(sizes(*ROOT)))
    assert "--gradients" in healthy.unchecked
    assert "2.65 times" in healthy.unchecked
    exploding = FAILURE.look(evidence(sizes(1, 1e9), weights="fresh"))
    assert len(exploding.suspicions) == 1
    assert "--gradients" in exploding.unchecked


def test_with_both_it_is_clear_with_numbers():
    looked = FAILURE.look(evidence(sizes(*ROOT), gains(*[1.0] * 7)))
    assert (looked.suspicions, looked.unchecked) == ((), "")
    assert "2.65 times" in looked.clear


def test_layers_at_the_floor_are_left_out():
    rows = [*sizes(1, 1, 1, 1e9), *residuals([1, 1, 1, 1e-8], floor=(3,))]
    assert not found(rows, weights="fresh")


def test_without_rows_it_is_unchecked():
    assert "two states" in FAILURE.look(evidence([])).unchecked


def gpt2(layers=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=50, n_positions=32)
        return GPT2LMHeadModel(config).eval()


def examined(model):
    ids = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(0))
    report = fullrank.examine(model, {"input_ids": ids, "labels": ids}, spectrum=False, reference=False, gradients=True)
    return FAILURE.look(Evidence.of(report, weights="fresh"))


@pytest.mark.parametrize("block", [1, 3])
def test_a_block_of_a_real_model_that_blows_up_is_named(block):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[block - 1].mlp.c_proj.weight.mul_(1e7)
    looked = examined(model)
    assert [one.layers for one in looked.suspicions] == [(block,)]


def test_a_default_initialisation_is_clear():
    looked = examined(gpt2())
    assert (looked.suspicions, looked.unchecked) == ((), "")
