"""Queries and keys that do not learn."""

import pytest
import torch
from head_rows import course, evidence, floor_at
from small_heads import evidence_of, small

from fullrank.diagnosis import diagnose
from fullrank.diagnosis.starvation import FAILURE
from fullrank.report.verdict import Severity


def ratios(special=None, *, usual=0.3, initial=0.02, stderr=0.001, metric="elasticity_ratio", layers=4):
    values = dict.fromkeys(range(1, layers + 1), usual) | (special or {})
    rows = course(metric, values, site="gradient", part="self", stderr=stderr)
    before = dict.fromkeys(values, initial)
    return rows + course(metric, before, site="gradient", part="self", source="initialisation")


def weights(changes, *, metric="spectral_norm"):
    """Weights by role, as multiples of those of the initialisation."""
    rows = []
    for role, by_layer in changes.items():
        rows += course(metric, by_layer, site="weights", part=role)
        rows += course(metric, dict.fromkeys(by_layer, 1.0), site="weights", part=role, source="initialisation")
    return rows


def test_elasticities_far_below_the_initialisation_are_a_warning_at_their_layers():
    (suspicion,) = FAILURE.look(evidence(ratios({2: 2e-5, 3: 1e-4}, stderr=None))).suspicions
    assert (suspicion.severity, suspicion.layers, suspicion.tests) == (Severity.WARN, (2, 3), ())
    assert [(one.value, one.expected) for one in suspicion.comparisons] == [(2e-5, 0.02), (1e-4, 0.02)]
    assert "layers 2–3" in suspicion.claim
    assert diagnose(evidence(ratios({2: 2e-5}, stderr=None)), [FAILURE]).worst is Severity.WARN


def test_gradient_ratios_of_a_healthy_initialisation_are_clear():
    for weights_are in ("fresh", "trained"):
        rows = ratios(usual=0.03, initial=0.03) + ratios(usual=0.025, metric="query_key_to_value_output")
        assert FAILURE.look(evidence(rows, weights=weights_are)).clear


def test_a_fall_within_the_noise_is_clear():
    assert FAILURE.look(evidence(ratios({2: 5e-4}, stderr=3e-4))).clear
    assert FAILURE.look(evidence(ratios({2: 5e-4}, stderr=1e-5))).suspicions


@pytest.mark.parametrize("known", ["fresh", "unknown"])
def test_without_another_initialisation_layers_are_held_against_earlier_ones(known):
    def seen(values):
        rows = [row for row in ratios(values, stderr=None) if row.source == "measured"]
        return evidence(rows, weights=known)

    (suspicion,) = FAILURE.look(seen({1: 1e-3, 2: 2e-3, 3: 5e-5, 4: 1e-6})).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.NOTE, (3, 4))
    assert [one.value for one in suspicion.comparisons] == [2e-3, 5e-5, 1e-6]
    assert FAILURE.look(seen({1: 1e-6, 2: 2e-3, 3: 2e-3, 4: 3e-4})).clear  # small at first, as tiny embeddings make it
    assert FAILURE.look(seen({1: 6e-13, 2: 6e-13, 3: 0.0, 4: 0.0})).clear  # rounding beside nothing


def test_layers_that_read_rounding_errors_are_left_out_and_said():
    looked = FAILURE.look(evidence([*ratios({3: 1e-6}, stderr=None), floor_at(2)]))
    assert "layer 3 left out, at the float floor" in looked.clear
    floors = [floor_at(layer) for layer in range(4)]
    assert "float floor" in FAILURE.look(evidence([*ratios(), *floors])).unchecked


def test_without_gradients_and_weights_it_is_unchecked():
    assert "--gradients" in FAILURE.look(evidence([])).unchecked


def test_queries_and_keys_that_still_look_freshly_drawn_are_found_where_the_others_moved():
    moved = {1: 2.0, 2: 2.0, 3: 1.9}
    changes = {"q": {1: 1.6, 2: 1.01, 3: 0.98}, "k": {1: 1.5, 2: 0.99, 3: 1.02}, "v": moved, "o": moved}
    (suspicion,) = FAILURE.look(evidence(weights(changes))).suspicions
    assert (suspicion.severity, suspicion.layers) == (Severity.WARN, (2, 3))
    assert all(one.against == "initialisation" for one in suspicion.comparisons)
    barely = {role: dict.fromkeys((1, 2, 3), 1.02) for role in "qkvo"}
    assert "differ from a fresh draw" in FAILURE.look(evidence(weights(barely))).clear
    only_keys = changes | {"q": {1: 1.6, 2: 1.4, 3: 1.5}}
    assert FAILURE.look(evidence(weights(only_keys))).clear
    assert not FAILURE.look(evidence(weights(changes), weights="fresh")).suspicions


def test_a_query_gradient_below_the_optimisers_epsilon_is_found_where_the_loss_is_the_models_own():
    def seen(epsilon, *, exact=True):
        rows = course("elasticity", {1: 1e-3, 2: 1e-6}, site="gradient", part="q", exact=exact)
        return evidence(rows + course("weight_rms", {1: 0.05, 2: 0.05}, site="weights", part="q"), epsilon=epsilon)

    (suspicion,) = FAILURE.look(seen(1e-8)).suspicions  # 1e-6 / (0.05 · 64²) = 4.9e-9
    assert (suspicion.severity, suspicion.layers) == (Severity.WARN, (2,))
    assert suspicion.comparisons[0].value == pytest.approx(1e-6 / (0.05 * 64**2))
    assert suspicion.comparisons[0].expected == 1e-8
    assert not FAILURE.look(seen(1e-10)).suspicions
    assert not FAILURE.look(seen(None)).suspicions
    assert not FAILURE.look(seen(1e-8, exact=False)).suspicions


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_whose_queries_vanished_is_found_by_its_elasticity(causal):
    model = small(causal=causal)
    with torch.no_grad():
        model.blocks[1].q.weight *= 1e-4
        model.blocks[1].k.weight *= 1e-4
    (suspicion,) = FAILURE.look(evidence_of(model, gradients=True)).suspicions
    assert suspicion.layers == (2,)
    assert FAILURE.look(evidence_of(small(causal=causal), gradients=True)).clear


def test_queries_and_keys_frozen_while_the_rest_is_trained_are_found_in_every_layer():
    def trained(*, frozen):
        model = small(seed=3).train()
        learning = [p for name, p in model.named_parameters() if not (frozen and (".q." in name or ".k." in name))]
        optimiser = torch.optim.AdamW(learning, lr=3e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            ids = torch.randint(40, (16, 16), generator=generator)
            ids[:, 8:] = ids[:, :8]  # the second half repeats the first: attention has something to find
            model.zero_grad()
            loss = model(ids, ids.roll(-3, 1))
            loss.backward()
            optimiser.step()
        return model.eval()

    (suspicion,) = FAILURE.look(evidence_of(trained(frozen=True), of_weights=True)).suspicions
    assert suspicion.layers == (1, 2, 3)
    assert FAILURE.look(evidence_of(trained(frozen=False), of_weights=True)).clear
