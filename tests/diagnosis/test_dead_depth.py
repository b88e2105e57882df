"""Dead depth: found in planted rows, tested by skipping, left alone in healthy ones."""

import math

import pytest
import torch
from depth_rows import Told, evidence, over_depth, residuals
from transformers import GPT2Config, GPT2Model

import fullrank
from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.dead_depth import FAILURE
from fullrank.report.verdict import Severity

HEALTHY = (0.58, 0.49, 0.51, 0.58, 0.61, 0.83)  # the pretrained encoder


def updates(*values, **options):
    cosines = [1 - value**2 / 2 for value in values]
    return [
        *over_depth("update_share", values, start=1, **options),
        *over_depth("neighbour_cosine", cosines, start=1, **options),
    ]


def test_blocks_that_change_little_are_suspected_in_runs():
    looked = FAILURE.look(evidence(updates(0.5, 0.01, 0.4, 0.5, 0.6, 0.5, 0.4, 0.02, 0.03, 0.6)))
    assert [one.layers for one in looked.suspicions] == [(2,), (8, 9)]
    assert all(one.severity is Severity.WARN for one in looked.suspicions)
    assert "blocks 8–9 of 10" in looked.suspicions[1].claim
    assert "3.00 %" in looked.suspicions[1].claim


def test_a_run_is_skipped_block_by_block_and_together():
    tester = Told()
    diagnosis = diagnose(evidence(updates(0.5, 0.4, 0.01, 0.02, 0.4, 0.6, 0.5)), [FAILURE], tester=tester)
    assert [(one.kind, one.layer, one.also) for one in tester.asked] == [
        ("skip-block", 3, ()),
        ("skip-block", 4, ()),
        ("skip-block", 3, (4,)),
    ]
    (verdict,) = diagnosis.verdicts
    assert (verdict.severity, verdict.layers) == (Severity.WARN, (3, 4))


def test_a_third_of_the_stack_is_one_failure_and_all_of_it_is_skipped():
    tester = Told()
    diagnosis = diagnose(evidence(updates(0.01, 0.5, 0.6, 0.01, 0.5, 0.6)), [FAILURE], tester=tester)
    (verdict,) = diagnosis.verdicts
    assert (verdict.severity, verdict.layers) == (Severity.FAIL, (1, 4))
    assert tester.asked[-1].also == (4,)


def test_a_block_that_matters_is_refuted_and_one_of_a_group_too():
    rows = updates(0.5, 0.01, 0.4, 0.5, 0.6, 0.5)
    assert diagnose(evidence(rows), [FAILURE], tester=Told(effects={(2,): 0.3})).verdicts == ()
    group = evidence(updates(0.5, 0.01, 0.02, 0.5, 0.6, 0.5, 0.6))
    refuted = diagnose(group, [FAILURE], tester=Told(effects={(2, 3): 0.3}))
    assert refuted.verdicts == ()
    assert "refuted" in refuted.clear[0].words


def test_untested_it_is_a_note():
    (verdict,) = diagnose(evidence(updates(0.01, 0.5, 0.6)), [FAILURE]).verdicts
    assert verdict.severity is Severity.NOTE


def test_a_block_that_changes_the_size_alone_changes_nothing_that_a_norm_would_let_through():
    rows = [
        *over_depth("update_share", [0.5, 2.0, 0.5, 0.5], start=1),
        *over_depth("neighbour_cosine", [0.8, 0.99999, 0.8, 0.8], start=1),
    ]
    (suspicion,) = FAILURE.look(evidence(rows)).suspicions
    assert suspicion.layers == (2,)


@pytest.mark.parametrize("scope", ["no-first", "late"])
def test_a_huge_first_token_does_not_make_blocks_look_dead(scope):
    # the stream without its first token is a hundredth of the whole: 1 % of the whole may be all of it
    rows = [*updates(0.01, 0.01, 0.01), *over_depth("rms", [100.0] * 4), *over_depth("rms", [1.0] * 4, scope=scope)]
    looked = FAILURE.look(evidence(rows))
    assert looked.suspicions == ()
    assert "100 % or more" in looked.clear or "1.00 %" not in looked.clear


def test_healthy_blocks_are_clear_and_the_smallest_is_named():
    looked = FAILURE.look(evidence(updates(*HEALTHY)))
    assert looked.suspicions == ()
    assert "block 2" in looked.clear
    assert f"{100 * math.sqrt(1 - (1 - 0.49**2 / 2) ** 2):.1f} %" in looked.clear


def test_an_update_that_may_be_above_the_limit_is_none():
    sure = evidence(updates(0.04, 0.5, 0.5, 0.5, stderr=0.001))
    unsure = evidence(over_depth("update_share", [0.04, 0.5, 0.5, 0.5], start=1, stderr=0.02))
    assert [one.layers for one in FAILURE.look(sure).suspicions] == [(1,)]
    assert FAILURE.look(unsure).suspicions == ()


def test_layers_at_the_floor_are_left_out_and_said_so():
    rows = [*updates(0.5, 0.6, 1e-4, 1e-4), *residuals([1, 0.9, 0.8, 1e-8, 1e-8], floor=(3, 4))]
    looked = FAILURE.look(evidence(rows))
    assert looked.suspicions == ()
    assert "layers 3–4 left out" in looked.clear


def test_without_rows_it_is_unchecked():
    assert "needs a block" in FAILURE.look(evidence([])).unchecked


def test_weights_that_may_be_fresh_are_held_to_it_only_where_the_blocks_wrote_at_initialisation():
    rows = updates(0.5, 0.01, 0.6, 0.5)
    for drawn, severity in (((0.2, 0.2, 0.2, 0.2), Severity.WARN), ((0.2, 0.01, 0.2, 0.2), Severity.NOTE)):
        known = evidence(rows, updates(*drawn, source="initialisation"), weights="unknown")
        (verdict,) = diagnose(known, [FAILURE], tester=Told()).verdicts
        assert verdict.severity is severity
    (unreferenced,) = diagnose(evidence(rows, weights="unknown"), [FAILURE], tester=Told()).verdicts
    assert unreferenced.severity is Severity.NOTE


def test_fresh_weights_are_not_held_to_it():
    diagnosis = diagnose(evidence(updates(0.01, 0.01), weights="fresh"), [FAILURE])
    assert diagnosis.verdicts == ()
    assert "trained weights only" in diagnosis.unchecked[0].words


def gpt2(*dead, layers=6):
    """A decoder whose blocks write a good part of the stream, but for those named, which write nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=50, n_positions=32, initializer_range=0.2)
        model = GPT2Model(config).eval()
    with torch.no_grad():
        for block in dead:
            for module in (model.h[block - 1].attn.c_proj, model.h[block - 1].mlp.c_proj):
                module.weight.zero_()
                module.bias.zero_()
    return model


def tokens(seed=0):
    return torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dead", [(), (3,), (1, 4)])
def test_identities_in_a_real_model_are_found_and_no_other_block(dead):
    report = fullrank.examine(gpt2(*dead, layers=6), {"input_ids": tokens()}, spectrum=False, reference=False)
    looked = FAILURE.look(Evidence.of(report, weights="trained"))
    assert bool(looked.clear) == (not dead)
    assert {layer for one in looked.suspicions for layer in one.layers} == set(dead)
    assert all((one.severity is Severity.FAIL) == (len(dead) * 3 >= 6) for one in looked.suspicions)
