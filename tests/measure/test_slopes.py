"""Slopes over contexts: paired over sequences, as a naive float64 loop gives them; known exponents come back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.capture.events import AttentionCall, StreamState
from fullrank.measure import AttentionObserver, StreamObserver
from fullrank.measure.contexts import Reading, first_tokens
from fullrank.measure.samples import Place, Samples
from fullrank.measure.slopes import slopes, trend
from fullrank.metrics import gram_stable_rank
from fullrank.operators import AttentionOperator, Causal
from fullrank.operators.markov import lognormal_markov
from golden import assert_golden

PLACE = Place("encoder", 1, "stream", "out")
# Student's t at 97.5 %, from printed tables
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 8: 2.365}


def oracle(x, Y):
    """Slope of every complete sequence by the textbook formula, then mean, standard error and interval."""
    betas = []
    for y in Y:
        if any(math.isnan(v) for v in y):
            continue
        x_bar, y_bar = sum(x) / len(x), sum(y) / len(y)
        above = sum((a - x_bar) * (b - y_bar) for a, b in zip(x, y, strict=True))
        betas.append(above / sum((a - x_bar) ** 2 for a in x))
    n = len(betas)
    mean = sum(betas) / n
    stderr = math.sqrt(sum((b - mean) ** 2 for b in betas) / (n - 1) / n)
    return n, mean, stderr


class Kept:
    """An observer that has these values."""

    needs = frozenset()

    def __init__(self, **metrics):
        self.samples = Samples()
        for metric, values in metrics.items():
            self.samples.add(PLACE, metric, torch.as_tensor(values, dtype=torch.float64))

    def rows(self):
        return self.samples.rows()


def readings(by_context, places=None):
    found = []
    for context, metrics in by_context.items():
        count = len(next(iter(metrics.values())))
        where = [torch.arange(count)] if places is None else places[context]
        found.append(Reading(context, [Kept(**metrics)], {"encoder": where}, frozenset({"encoder"})))
    return found


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(3, 16), min_size=2, max_size=5, unique=True).map(sorted),
    st.integers(2, 9),
    st.integers(0, 2**20),
)
def test_the_trend_equals_a_naive_loop(powers, sequences, seed):
    rng = np.random.default_rng(seed)
    Y = rng.normal(size=(sequences + 1, len(powers))) * 10 ** rng.uniform(-3, 3)
    Y[-1, 0] = math.nan
    found = trend(torch.tensor(powers, dtype=torch.float64), torch.from_numpy(Y))
    n, mean, stderr = oracle(powers, Y.tolist())
    assert int(found.n) == n == sequences
    assert float(found.mean) == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert float(found.stderr) == pytest.approx(stderr, rel=1e-9)
    if n in STUDENT:
        assert float(found.high - found.mean) == pytest.approx(STUDENT[n] * stderr, rel=1e-3)
    assert float(found.mean - found.low) == pytest.approx(float(found.high - found.mean))


def test_what_makes_one_sequence_larger_at_every_context_enters_no_interval():
    """Pairing: with slopes that agree exactly the standard error is 0, however far apart the sequences lie."""
    contexts = (64, 256, 1024)
    values = {c: {"entropy": [level + 0.25 * math.log2(c) for level in (1.0, 50.0, -9.0)]} for c in contexts}
    (slope,) = slopes(readings(values))
    assert (slope.contexts, slope.n) == (contexts, 3)
    assert slope.per_doubling == pytest.approx(0.25)
    assert slope.stderr == pytest.approx(0, abs=1e-12)
    assert slope.significant
    assert slope.exponent is None  # not positive throughout


def test_a_power_of_the_context_gives_its_exponent():
    contexts = (32, 64, 128, 4096)
    values = {c: {"entropy": [a * c**-0.75 for a in (1.0, 2.0, 7.0)]} for c in contexts}
    (slope,) = slopes(readings(values))
    assert slope.exponent == pytest.approx(-0.75)
    assert slope.exponent_low == pytest.approx(-0.75)


def test_sequences_are_paired_by_place_and_not_by_order():
    """Of the second batch only its last sequence is long enough; the values of the rest must not slide up."""
    short = {"entropy": [1.0, 2.0, 30.0, 4.0]}
    long = {"entropy": [2.0, 5.0]}
    places = {16: [torch.tensor([0, 1, 2, 3])], 32: [torch.tensor([0, 3])]}
    (slope,) = slopes(readings({16: short, 32: long}, places))
    assert (slope.n, slope.per_doubling, slope.stderr) == (2, 1.0, 0.0)


def test_one_sequence_has_a_slope_and_no_interval():
    (slope,) = slopes(readings({16: {"entropy": [1.0]}, 64: {"entropy": [4.0]}}))
    assert (slope.n, slope.per_doubling, slope.exponent) == (1, 1.5, pytest.approx(1.0))
    assert (slope.stderr, slope.low, slope.high, slope.note) == (None, None, None, "one sequence: no interval")


def test_contexts_at_which_nobody_has_the_number_are_left_out_and_said():
    nothing = [math.nan, math.nan]
    found = slopes(
        readings(
            {
                16: {"entropy": nothing, "selectivity": nothing},
                32: {"entropy": [1.0, 1.0], "selectivity": [1.0, 1.0]},
                64: {"entropy": [2.0, 3.0], "selectivity": nothing},
            }
        )
    )
    assert [(one.metric, one.contexts, one.per_doubling) for one in found] == [
        ("entropy", (32, 64), 1.5),
        ("selectivity", (16, 32, 64), None),
    ]
    assert found[1].note


def test_numbers_of_the_whole_batch_have_a_slope_and_say_why_there_is_no_interval(generator):
    X = torch.randn(3, 64, 8, generator=generator) + 0.5
    found = []
    for c in (16, 64):
        observer = StreamObserver()
        for layer in range(2):
            observer.see(first_tokens(StreamState("encoder", layer, "stream", "out", "", X), c))
        found.append(Reading(c, [observer], {"encoder": [torch.arange(3)]}, frozenset({"encoder"})))
    by_metric = {(one.metric, one.layer): one for one in slopes(found)}
    for metric in (
        "shared_energy",
        "token_energy",
        "similarity_across",
        "similarity_standardized",
        "orthogonality_gap",
    ):
        slope = by_metric[metric, 0]
        assert slope.per_doubling is not None
        assert slope.stderr is None
        assert "whole batch" in slope.note
    assert by_metric["similarity", 0].stderr is not None
    assert not any(metric == "sink_position" for metric, _ in by_metric)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_attention_of_independent_logits_has_the_exponents_of_averaging(spread, generator):
    """Σ A² falls like 1/T and exp H grows like T for logits that do not depend on T; normalised entropy stays."""
    contexts, T, width = (128, 256, 512), 512, 16
    q, k = (torch.randn(4, 1, T, width, generator=generator) for _ in range(2))
    attention = AttentionOperator(q, k, scale=spread / math.sqrt(width), mask=Causal())
    call = AttentionCall("decoder", 1, "self", "", attention, q, None, None, True, "sdpa", torch.float32)
    found = []
    for c in contexts:
        observer = AttentionObserver()
        observer.see(first_tokens(call, c))
        found.append(Reading(c, [observer], {"decoder": [torch.arange(4)]}, frozenset({"decoder"})))
    by_metric = {(one.metric, one.scope): one for one in slopes(found)}
    assert by_metric["inverse_participation", "late"].exponent == pytest.approx(-1, abs=0.02)
    assert by_metric["effective_keys", "late"].exponent == pytest.approx(1, abs=0.02)
    assert by_metric["entropy", "late"].per_doubling == pytest.approx(math.log(2), abs=0.01)
    assert abs(by_metric["normalized_entropy", "late"].per_doubling) < 0.005
    if spread:  # the deviation of the logits does not move, and b̂ = std/√log T falls as it says
        gauge = by_metric["log_context_gauge", "late"]
        assert gauge.low < gauge.per_doubling < 0 < -gauge.low
        assert by_metric["logit_std", "late"].low < 0.01


def test_width_collapse_has_the_exponents_of_the_paper():
    """Golden `mtg-width-collapse-slope`: gram stable rank − 1 of attention-only layers falls like T^(1−2ℓ) σ^4ℓ.

    σ² = ‖A‖_F² − 1 still grows with T at these sizes, which flattens the slopes; it is divided out.
    """
    contexts, layers = (50, 100, 200, 400), (1, 2)
    by_layer = {layer: {c: {"gram_stable_rank": []} for c in contexts} for layer in layers}
    for T in contexts:
        g = torch.Generator().manual_seed(T)
        variance = float(lognormal_markov(T, generator=g, lead=(10,)).square().sum((-2, -1)).mean()) - 1
        for _ in range(8):
            X = torch.linalg.qr(torch.randn(T, T, generator=g, dtype=torch.float64)).Q
            for layer in layers:
                A = lognormal_markov(T, generator=g, dtype=torch.float64)
                X = A @ X @ torch.randn(T, T, generator=g, dtype=torch.float64)
                excess = (float(gram_stable_rank(X)) - 1) / variance ** (2 * layer)
                by_layer[layer][T]["gram_stable_rank"].append(excess)
    found = [slopes(readings(by_layer[layer]))[0] for layer in layers]
    assert_golden("mtg-width-collapse-slope", [one.exponent for one in found])
    assert all(one.exponent_high < 0 for one in found)
