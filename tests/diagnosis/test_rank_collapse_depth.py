"""Rank collapse in depth: where tokens merged for good, not where a bias, an input or a task explains the cosine."""

from dataclasses import replace

import pytest
import torch
from depth_rows import Told, evidence, over_depth, residuals
from transformers import BertConfig, BertModel

import fullrank
from fullrank import edit
from fullrank.capture import survey
from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.rank_collapse_depth import FAILURE
from fullrank.metrics import floor
from fullrank.report.verdict import Severity
from fullrank.verbs.statistics import statistics_notes

COLLAPSED = (0.95, 0.9, 0.8, 1e-4, 1e-4, 1e-4, 1e-4)
MERGED = (0.95, 0.9, 0.8, 5e-3, 5e-3, 5e-3, 5e-3)


def shares(*values, **options):
    return over_depth("token_energy", values, **options)


def standardized(*values):
    return over_depth("similarity_standardized", values)


def found(*rows, **known):
    looked = FAILURE.look(evidence(*rows, **known))
    assert not looked.unchecked
    return looked.suspicions


def test_a_stream_that_keeps_next_to_nothing_of_its_tokens_is_named_at_the_first_layer():
    (one,) = found(shares(*COLLAPSED), over_depth("similarity", [0, 0.1, 0.2, 0.9999, 0.9999, 0.9999, 0.9999]))
    assert one.layers == (3, 4, 5, 6)
    assert one.severity is Severity.WARN
    assert "from layer 3 of 6 on" in one.claim
    assert "cosine 1.00" in one.claim


def test_a_decoder_that_merges_is_a_failure():
    (one,) = found(shares(*COLLAPSED), causal=True)
    assert one.severity is Severity.FAIL


def test_its_test_is_the_means_at_the_first_layer():
    tester = Told()
    (verdict,) = diagnose(evidence(shares(*COLLAPSED), causal=True), [FAILURE], tester=tester).verdicts
    assert [(one.kind, one.layer) for one in tester.asked] == [("stream-means", 3)]
    assert verdict.severity is Severity.FAIL
    refuted = diagnose(evidence(shares(*COLLAPSED)), [FAILURE], tester=Told(otherwise=0.4))
    assert refuted.verdicts == ()


def test_merged_tokens_count_only_where_standardised_features_say_so():
    assert found(shares(*MERGED), standardized(0, 0.1, 0.2, 0.9, 0.9, 0.9, 0.9))
    assert not found(shares(*MERGED), standardized(0, 0, 0, 0.1, 0.1, 0.1, 0.1))
    assert not found(shares(*MERGED))


def test_a_few_rogue_channels_are_no_collapse():
    entropies = over_depth("channel_entropy", [0.9, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2])
    assert not found(shares(*COLLAPSED), entropies)


def test_what_the_norm_brings_out_again_is_no_collapse():
    assert not found(shares(*COLLAPSED), shares(*[0.6] * 7, site="read"))
    assert found(shares(*COLLAPSED), shares(*COLLAPSED, site="read"))


def test_a_dip_that_later_layers_undo_is_no_collapse():
    assert not found(shares(0.9, 0.8, 1e-4, 1e-4, 0.5, 0.6, 0.7))


def test_an_input_that_is_one_token_is_no_matter_of_depth():
    assert not found(shares(*[1e-4] * 7))
    assert not found(shares(*COLLAPSED), residuals([1e-8] * 7, floor=range(7)))
    assert not found(shares(None, *COLLAPSED[1:]), over_depth("rms", [0.0, 1, 1, 1, 1, 1, 1]))


def test_what_the_architecture_has_at_initialisation_is_not_held_against_trained_weights():
    drawn = shares(0.95, 0.5, 0.1, 5e-4, 5e-4, 5e-4, 5e-4, source="initialisation")
    assert not found(shares(*COLLAPSED), drawn)
    apart = shares(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, source="initialisation")
    (one,) = found(shares(*COLLAPSED), apart)
    assert "70.0 % at initialisation" in one.claim
    assert one.comparisons[0].against == "initialisation"


def test_a_share_that_may_be_above_the_limit_is_none():
    assert not found(shares(*MERGED, stderr=0.01), standardized(*[0.9] * 7))
    assert not found(shares(*COLLAPSED, stderr=0.05))


def test_random_tokens_make_it_a_note_even_when_tested():
    (one,) = found(shares(*COLLAPSED), causal=True, kind="random tokens")
    assert (one.severity, one.tests) == (Severity.NOTE, ())
    (fresh,) = found(shares(*COLLAPSED), causal=True, kind="random tokens", weights="fresh")
    assert fresh.severity is Severity.WARN


def test_merging_in_the_last_layer_is_the_answer_of_an_encoder_and_the_loss_of_a_decoder():
    last = shares(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 1e-4)
    assert found(last)[0].severity is Severity.NOTE
    assert found(last, causal=True)[0].severity is Severity.FAIL


def test_fresh_weights_are_held_against_the_null_and_the_dtype():
    (one,) = found(shares(*COLLAPSED), weights="fresh")
    assert (one.severity, one.tests) == (Severity.WARN, ())
    assert (one.comparisons[0].against, one.comparisons[0].expected) == ("null", 0.97)
    (note,) = found(shares(*MERGED), weights="fresh")
    assert note.severity is Severity.NOTE
    assert not found(shares(0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.011), weights="fresh")


@pytest.mark.parametrize("weights", ["fresh", "trained"])
def test_at_the_floor_it_rests_on_the_floor_and_not_on_numbers_that_are_rounding(weights):
    rows = [*shares(0.9, 0.5, 0.2, 3e-15, 3e-15), *residuals([1, 0.7, 0.4, 6e-8, 6e-8], floor=(3, 4))]
    (one,) = found(rows, over_depth("similarity", [0, 0, 0.1, 1.0, 1.0]), weights=weights)
    assert (one.layers, one.severity) == ((3, 4), Severity.FAIL)
    assert "rounding in float32" in one.claim
    assert "cosine" not in one.claim
    (comparison,) = one.comparisons
    assert (comparison.metric, comparison.expected) == ("residual", floor(torch.float32))


@pytest.mark.parametrize("weights", ["fresh", "trained"])
def test_a_coarse_dtype_whose_rounding_is_a_share_of_the_embedding_is_no_collapse(weights):
    # bfloat16: the floor is .0625 of the stream's size, .004 of its energy
    coarse = {"dtype": "bfloat16", "weights": weights}
    given = [*shares(0.003, 0.003, 0.003), *residuals([0.06, 0.07, 0.05], floor=(2,))]
    assert not found(given, **coarse)
    fell = [*shares(0.9, 0.5, 0.003), *residuals([0.9, 0.7, 0.05], floor=(2,))]
    (one,) = found(fell, **coarse, causal=False)
    assert one.severity is Severity.NOTE
    assert "rounding in bfloat16" in one.claim
    lost = [*shares(0.9, 0.5, 1e-4), *residuals([0.9, 0.7, 0.01], floor=(2,))]
    (fresh,) = found(lost, dtype="bfloat16", weights="fresh")
    assert fresh.severity is Severity.FAIL


def test_at_the_floor_only_a_share_that_fell_from_the_initialisation_is_held_against_trained_weights():
    rows = [*shares(0.9, 0.5, 1e-15, 1e-15), *residuals([1, 0.7, 6e-8, 6e-8], floor=(2, 3))]
    assert not found(rows, shares(0.9, 0.1, 1e-15, 1e-15, source="initialisation"))
    assert found(rows, shares(0.9, 0.8, 0.7, 0.6, source="initialisation"))


def test_where_no_test_can_be_run_the_initialisation_or_the_floor_decides():
    untestable = Told(otherwise="its stream cannot be replaced.")

    def severity(*rows, **known):
        (one,) = diagnose(evidence(*rows, causal=True, **known), [FAILURE], tester=untestable).verdicts
        return one.severity

    assert severity(shares(*COLLAPSED)) is Severity.NOTE
    apart = shares(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, source="initialisation")
    assert severity(shares(*COLLAPSED), apart) is Severity.FAIL
    rounded = [*shares(0.9, 0.5, 1e-15, 1e-15), *residuals([1, 0.7, 6e-8, 6e-8], floor=(2, 3))]
    assert severity(rounded) is Severity.FAIL
    coarse = [*shares(0.9, 0.5, 0.003, 0.003), *residuals([0.9, 0.7, 0.05, 0.05], floor=(2, 3))]
    assert severity(coarse, dtype="bfloat16") is Severity.NOTE


def test_batch_norms_that_have_seen_no_batch_leave_it_unchecked():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
    notes = statistics_notes(model, batch_statistics=False)
    known = evidence(shares(*COLLAPSED), weights="fresh")
    noted = replace(known, about=known.about | {"notes": notes})
    assert FAILURE.look(known).suspicions
    assert "have seen a batch" in FAILURE.look(noted).unchecked
    assert FAILURE.look(replace(noted, weights="trained")).suspicions


def test_healthy_shares_are_clear_and_the_lowest_is_named():
    looked = FAILURE.look(evidence(shares(0.92, 0.86, 0.84, 0.81, 0.78, 0.77, 0.87)))
    assert looked.suspicions == ()
    assert "77.0 %" in looked.clear
    assert "layer 5" in looked.clear


def test_without_shares_it_is_unchecked():
    assert "needs a stream of tokens" in FAILURE.look(evidence([])).unchecked


def bert(layers=3, *, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
        return BertModel(BertConfig(num_hidden_layers=layers, **(sizes | options))).eval()


def batch():
    return {"input_ids": torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))}


def examined(model, given, *, reference=False, **known):
    return Evidence.of(fullrank.examine(model, given, spectrum=False, reference=reference), **known)


@pytest.mark.parametrize(("layer", "kept"), [(1, 1e-3), (2, 0.0)])
def test_a_stream_pushed_to_its_means_is_found_at_that_layer(layer, kept):
    model, given = bert(), batch()
    anatomy = survey(model, lambda: model(**given))

    def pushed(X):
        mean = X.mean(1, keepdim=True)
        return mean + kept * (X - mean)

    with edit.replace_stream(model, anatomy, pushed, layer=layer):
        (one,) = FAILURE.look(examined(model, given, weights="trained")).suspicions
    assert one.layers[0] == layer
    assert one.tests[0].intervention.layer == layer


@pytest.mark.parametrize("layer", [1, 2])
def test_a_stream_pushed_to_a_matrix_of_rank_one_is_found_at_that_layer(layer):
    model, given = bert(), batch()
    anatomy = survey(model, lambda: model(**given))

    def pushed(X):
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return U[..., :1] * S[..., None, :1] @ Vh[..., :1, :]

    with edit.replace_stream(model, anatomy, pushed, layer=layer):
        (one,) = FAILURE.look(examined(model, given, weights="trained", reference=True)).suspicions
    assert one.layers[0] == layer
    assert one.severity is Severity.WARN


def test_deep_post_norm_with_strong_averaging_collapses_at_initialisation_and_a_shallow_one_does_not():
    def averaging(layers):  # queries and keys small, values and the MLP large: branches as strong as the skip
        model = bert(layers, initializer_range=0.3)
        with torch.no_grad():
            for block in model.encoder.layer:
                block.attention.self.query.weight.mul_(0.01)
        return model

    given = batch()
    (deep,) = FAILURE.look(examined(averaging(24), given, weights="fresh")).suspicions
    assert deep.severity in (Severity.WARN, Severity.FAIL)
    assert FAILURE.look(examined(averaging(2), given, weights="fresh")).suspicions == ()
    assert FAILURE.look(examined(bert(6), given, weights="fresh")).suspicions == ()
