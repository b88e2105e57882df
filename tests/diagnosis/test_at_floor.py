"""At the floor: a note that names the layers, and nothing where tokens differ."""

import torch
from depth_rows import evidence, over_depth, residuals
from transformers import BertConfig, BertModel

import fullrank
from fullrank import edit
from fullrank.capture import survey
from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.at_floor import FAILURE
from fullrank.diagnosis.dead_depth import FAILURE as DEAD_DEPTH
from fullrank.diagnosis.numerics import FAILURE as NUMERICS
from fullrank.metrics import floor
from fullrank.report.verdict import Severity


def test_layers_that_are_rounding_are_a_note_against_the_dtype():
    (verdict,) = diagnose(evidence(residuals([1, 0.5, 1e-8, 1e-7], floor=(2, 3))), [FAILURE]).verdicts
    assert (verdict.severity, verdict.layers) == (Severity.NOTE, (2, 3))
    assert "layers 2–3 of 3" in verdict.claim
    assert [one.against for one in verdict.comparisons] == ["dtype", "dtype"]
    assert verdict.comparisons[0].expected == floor(torch.float32)


def test_healthy_residuals_are_clear_and_the_least_is_named():
    looked = FAILURE.look(evidence(residuals([0.98, 0.9, 0.41, 0.5])))
    assert looked.suspicions == ()
    assert "0.410" in looked.clear
    assert "layer 2" in looked.clear


def test_without_residuals_it_is_unchecked():
    assert "needs a stream" in FAILURE.look(evidence(over_depth("rms", [1.0, 1.0]))).unchecked


def bert(layers=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=50,
            initializer_range=0.2,
        )
        return BertModel(config).eval()


def test_a_stream_of_means_is_at_the_floor_from_there_on_and_other_failures_leave_it_alone():
    model, batch = bert(), {"input_ids": torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(0))}
    anatomy = survey(model, lambda: model(**batch))
    with edit.replace_stream(model, anatomy, lambda X: X.mean(1, keepdim=True), layer=2):
        planted = Evidence.of(fullrank.examine(model, batch, spectrum=False, reference=False), weights="trained")
    healthy = Evidence.of(fullrank.examine(model, batch, spectrum=False, reference=False), weights="trained")
    (suspicion,) = FAILURE.look(planted).suspicions
    assert suspicion.layers == (2, 3, 4)
    assert FAILURE.look(healthy).suspicions == ()
    assert NUMERICS.look(planted).suspicions == ()
    assert DEAD_DEPTH.look(planted).suspicions == ()
