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


def verdicts(rows, *drawn, **told):
    """Verdicts on rows, and which blocks were skipped for them."""
    tester = Told(**told)
    found = diagnose(evidence(rows, *drawn), [FAILURE], tester=tester).verdicts
    assert {one.kind for one in tester.asked} <= {"skip-block"}
    return found, [(one.layer, *one.also) for one in tester.asked]


def test_every_block_that_changes_little_is_suspected_and_all_of_them_are_one_verdict():
    rows = updates(0.5, 0.01, 0.4, 0.5, 0.6, 0.5, 0.4, 0.02, 0.03, 0.6)
    looked = FAILURE.look(evidence(rows))
    assert [one.layers for one in looked.suspicions] == [(2,), (8,), (9,)]
    assert all(one.severity is Severity.WARN for one in looked.suspicions)
    (untested,) = diagnose(evidence(rows), [FAILURE]).verdicts
    (tested,), _ = verdicts(rows)
    assert (untested.severity, tested.severity) == (Severity.NOTE, Severity.WARN)
    for one in (untested, tested):
        assert one.layers == (2, 8, 9)
        assert "blocks 2 and 8–9 of 10 change the stream by at most 3.00 % each" in one.claim
        assert {number.where for number in one.comparisons} == {f"encoder layer {block}" for block in (2, 8, 9)}


def test_blocks_are_skipped_one_by_one_and_together():
    (verdict,), skipped = verdicts(updates(0.5, 0.4, 0.01, 0.02, 0.4, 0.6, 0.5))
    assert skipped == [(3,), (4,), (3, 4)]
    assert (verdict.severity, verdict.layers, len(verdict.effects)) == (Severity.WARN, (3, 4), 3)
    assert "alone and together" in verdict.claim


def test_a_third_of_the_stack_that_nothing_misses_together_is_one_failure():
    (verdict,), skipped = verdicts(updates(0.01, 0.5, 0.6, 0.01, 0.5, 0.6))
    assert (verdict.severity, verdict.layers) == (Severity.FAIL, (1, 4))
    assert skipped == [(1,), (4,), (1, 4)]


def test_twelve_dead_blocks_are_one_verdict_whatever_they_are_together():
    rows = updates(*[0.01] * 12, *[0.5] * 12)
    everything = tuple(range(1, 13))
    for change, grave, words in (
        (0.0, Severity.FAIL, "alone and together"),
        (0.4, Severity.WARN, "each of them"),  # each can be spared while the others are there
        ("too large for this machine.", Severity.WARN, "each of them"),
    ):
        (verdict,), skipped = verdicts(rows, effects={everything: change})
        assert (verdict.severity, verdict.layers) == (grave, everything)
        assert words in verdict.claim
        assert len(skipped) == 13
        assert len(verdict.effects) == 13 - isinstance(change, str)


def test_a_block_that_matters_is_refuted_and_only_it_is_left_out():
    alone = updates(0.5, 0.01, 0.4, 0.5, 0.6, 0.5)
    refuted = diagnose(evidence(alone), [FAILURE], tester=Told(effects={(2,): 0.3}))
    assert refuted.verdicts == ()
    assert "refuted" in refuted.clear[0].words
    group = updates(0.5, 0.01, 0.02, 0.01, 0.6, 0.5, 0.6, 0.6, 0.6, 0.6)
    (verdict,), skipped = verdicts(group, effects={(3,): 0.3})
    assert (verdict.severity, verdict.layers) == (Severity.WARN, (2, 4))
    assert skipped == [(2,), (3,), (4,), (2, 4)]
    assert "Not so block 3, which looked alike: skipping it has an effect." in verdict.claim
    (verdict,), _ = verdicts(group, effects={(3,): 0.3, (4,): 0.3})
    assert verdict.layers == (2,)
    assert "block 2 of 10 changes" in verdict.claim
    assert "skipping them has an effect" in verdict.claim


def test_one_block_of_three_is_a_third_of_the_stack():
    (verdict,), skipped = verdicts(updates(0.5, 0.01, 0.6))
    assert (verdict.severity, verdict.layers, skipped) == (Severity.FAIL, (2,), [(2,)])


def test_a_third_counts_only_blocks_that_nothing_misses():
    (verdict,), _ = verdicts(updates(0.01, 0.01, 0.6, 0.5, 0.5, 0.6), effects={(1,): 0.3})
    assert (verdict.severity, verdict.layers) == (Severity.WARN, (2,))


def test_a_block_of_which_nothing_could_be_told_is_a_note_beside_the_others():
    found, _ = verdicts(updates(0.5, 0.01, 0.5, 0.01, 0.5, 0.5, 0.5), effects={(4,): 0.01})
    assert [(one.severity, one.layers) for one in found] == [(Severity.WARN, (2,)), (Severity.NOTE, (4,))]


@pytest.mark.parametrize(
    ("drawn", "severity"), [((), Severity.NOTE), ((0.01, 0.01), Severity.NOTE), ((0.2, 0.2), Severity.WARN)]
)
def test_where_no_block_can_be_skipped_they_must_have_written_at_initialisation(drawn, severity):
    initial = updates(*drawn, 0.5, source="initialisation") if drawn else []
    untestable = {"otherwise": "the block gives another shape than it is given."}
    (verdict,), _ = verdicts(updates(0.01, 0.01, 0.5), initial, **untestable)
    assert (verdict.severity, verdict.effects) == (severity, ())


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


def test_weights_that_may_be_fresh_are_a_note_whatever_another_draw_wrote():
    rows = updates(0.5, 0.01, 0.6, 0.5)
    for drawn in ((), (0.2, 0.2, 0.2, 0.2), (0.2, 0.01, 0.2, 0.2)):
        initial = updates(*drawn, source="initialisation") if drawn else []
        (verdict,) = diagnose(evidence(rows, initial, weights="unknown"), [FAILURE], tester=Told()).verdicts
        assert verdict.severity is Severity.NOTE


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
    assert all(one.severity is Severity.WARN for one in looked.suspicions)
