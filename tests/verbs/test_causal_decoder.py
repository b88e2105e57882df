"""The report on a decoder with grouped queries equals what eager maps and plain hooks give, however it is padded."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import fullrank
from alike import differences
from oracles import eager_decoder

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


LENGTHS = (136, 33, 90, 61)  # 136: the fewest keys are 32, not a quarter; 33 and 61: an odd number of tokens
LAYERS, HEADS = 2, 4
CONTINUOUS = {
    *("rms", "similarity", "residual", "stable_rank", "centered_stable_rank"),
    *("shared_energy", "sequence_energy", "token_energy"),
    *("entropy", "normalized_entropy", "inverse_participation", "selectivity", "sink_mass", "branch_energy"),
    *("contrast_gain", "attention_s1", "attention_s2", "uniform_distance", "smoothing_gain"),
}
SIDES = pytest.mark.parametrize("side", [None, "left", "right"])


def decoder():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            num_hidden_layers=LAYERS,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=256,
            initializer_range=0.3,  # large enough for heads that are far from averaging
            pad_token_id=None,
        )
        return LlamaModel(config).eval()


def sequences(lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(64, (n,), generator=generator) for n in lengths]


def padded(some, side):
    """A batch of these sequences with padding on one side; of equal lengths, and without a mask, where side is None."""
    if side is None:
        return {"input_ids": torch.stack(some)}
    T = max(len(ids) for ids in some)
    batch = {"input_ids": torch.zeros(len(some), T, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, ids in enumerate(some):
        at = slice(T - len(ids), T) if side == "left" else slice(len(ids))
        batch["input_ids"][row, at] = ids
        batch["attention_mask"][row, at] = 1
    return batch


def cases(side):
    """Sequences, and the batch that they are examined in."""
    some = sequences(LENGTHS if side else [max(LENGTHS)] * len(LENGTHS))
    return some, padded(some, side)


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module", params=[None, "left", "right"])
def examined(model, request):
    assert model.config._attn_implementation == "sdpa"
    some, batch = cases(request.param)
    return examine(model, batch), eager_decoder.collect(model, some)


def found(report, metric, scope, **where):
    rows = report.rows.where(metric=metric, scope=scope, **where)
    assert len(rows), f"no rows of {metric} with {where} and scope {scope}"
    return {(row.layer, row.head): row for row in rows}


def chosen(T, scope, *, rows=False):
    """Ranks among the real tokens that a scope takes; of queries only those that see enough keys."""
    keep = eager_decoder.late(T) if scope == "late" else np.ones(T, bool)
    return keep & eager_decoder.eligible(T) if rows else keep


def same(row, per_sequence, rel, absolute):
    """Whether a row is the mean over sequences with its standard error."""
    assert row.value == pytest.approx(np.mean(per_sequence), rel=rel, abs=absolute), row
    stderr = np.std(per_sequence, ddof=1) / np.sqrt(len(per_sequence))
    assert row.stderr == pytest.approx(stderr, rel=2 * rel, abs=max(absolute, rel * abs(np.mean(per_sequence)))), row
    assert row.n == len(per_sequence)


def compare_stream(report, oracle, scope, rel, absolute):
    for part in ("out", "mid"):
        for index, states in enumerate(oracle[part]):
            place = {"site": "stream", "part": part}
            at = index + (part == "mid"), None
            taken = [X[chosen(len(X), scope)] for X in states]
            numbers = [eager_decoder.token_numbers(X) for X in taken]
            for name in numbers[0]:
                if "rank" not in name or part == "out":  # ranks are taken after whole blocks
                    same(found(report, name, scope, **place)[at], [n[name] for n in numbers], rel, absolute)
            without = [eager_decoder.energy_numbers(taken[:b] + taken[b + 1 :]) for b in range(len(taken))]
            for name, value in eager_decoder.energy_numbers(taken).items():
                row = found(report, name, scope, **place)[at]
                assert row.value == pytest.approx(value, rel=rel, abs=absolute), row
                jackknife = np.std([n[name] for n in without]) * np.sqrt(len(taken) - 1)
                assert row.stderr == pytest.approx(jackknife, rel=2 * rel, abs=max(absolute, rel * value)), row


def compare_rows(report, oracle, scope, rel, absolute):
    for index, (maps, values) in enumerate(zip(oracle["maps"], oracle["values"], strict=True)):
        for head in range(HEADS):
            numbers = [
                eager_decoder.row_numbers(A[head], V[head], chosen(A.shape[-1], scope, rows=True))
                for A, V in zip(maps, values, strict=True)
            ]
            for name in numbers[0]:
                row = found(report, name, scope, site="attention", part="self")[index + 1, head]
                same(row, [n[name] for n in numbers], rel, absolute)


def compare_spectra(report, oracle, rel, absolute):
    for index, maps in enumerate(oracle["maps"]):
        for head in range(HEADS):
            numbers = [eager_decoder.spectral_numbers(A[head], chosen(A.shape[-1], "late", rows=True)) for A in maps]
            for name in numbers[0]:
                row = found(report, name, "late", site="attention", part="self")[index + 1, head]
                same(row, [n[name] for n in numbers], rel, absolute)


@pytest.mark.parametrize("scope", ["all", "late"])
def test_every_stream_number_equals_plain_hooks(examined, scope):
    compare_stream(*examined, scope, 1e-3, 1e-6)


@pytest.mark.parametrize("scope", ["all", "late"])
def test_every_number_of_attention_rows_equals_eager_maps(examined, scope):
    compare_rows(*examined, scope, 1e-3, 1e-6)


def test_every_singular_value_equals_that_of_the_late_rows_of_eager_maps(examined):
    compare_spectra(*examined, 1e-3, 1e-6)


def test_the_maps_are_far_from_uniform(examined):
    """The comparisons would say little about heads that only average: these do not."""
    report = examined[0]
    assert min(row.value for row in report.rows.where(metric="branch_energy", scope="late")) > 0.5
    assert max(row.value for row in report.rows.where(metric="normalized_entropy", scope="late")) < 0.9


def test_the_headline_of_a_decoder_is_late(examined):
    report = examined[0]
    assert {row.scope for row in report.rows.where(metric="attention_s1")} == {"late"}
    assert {row.scope for row in report.rows.where(metric="entropy")} == {"all", "late", "late+no-sink"}
    assert {row.scope for row in report.rows.where(metric="similarity")} == {"all", "late"}


def keyed(report):
    return {(row.stack, row.layer, row.site + row.part, row.metric, row.head, row.scope): row for row in report.rows}


def test_two_batches_give_the_rows_of_one(model):
    ids = torch.stack(sequences([48] * 4))
    whole = examine(model, {"input_ids": ids})
    parts = examine(model, iter([{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]))
    # that one is read against rows shuffled at random, each batch with its own draw
    assert not differences(parts, whole, tolerance=1e-5, but={"bulk_excess"})


@SIDES
def test_a_float64_model_equals_the_float64_oracle(model, side):
    """Singular values to 1e-3 here too: their iteration stops by its own tolerance, whatever the dtype."""
    model = copy.deepcopy(model).double()
    some, batch = cases(side)
    report, oracle = examine(model, batch), eager_decoder.collect(model, some)
    assert report.about["dtype"] == "float64"
    for scope in ("all", "late"):
        compare_stream(report, oracle, scope, 1e-5, 1e-6)
        compare_rows(report, oracle, scope, 1e-5, 1e-6)
    compare_spectra(report, oracle, 1e-3, 1e-6)


@pytest.fixture(scope="module")
def low(model):
    return copy.deepcopy(model).bfloat16()


@SIDES
def test_a_bfloat16_model_is_within_its_roundings_of_the_float32_one(model, low, side):
    """The same (rounded) weights in both. A bfloat16 operation is off by at most u = 2⁻⁸ of its result.

    A state of the second layer lies behind some dozen of them, and a score of at most 16 moves by 16 u, so that a
    probability is off by the same share: 16 u, 6 %, bounds every number; where a mean of either sign may be near 0, so
    does u.
    """
    u = 2**-8
    _, batch = cases(side)
    exact = keyed(examine(copy.deepcopy(low).float(), batch))
    assert max(row.value for key, row in exact.items() if key[3] == "max_logit") < 16
    rounded = keyed(examine(low, batch))
    assert rounded.keys() == exact.keys()
    compared = 0
    for key, row in exact.items():
        if key[3] in CONTINUOUS:
            compared += 1
            assert rounded[key].value == pytest.approx(row.value, rel=16 * u, abs=u), key
            assert rounded[key].n == row.n
    assert compared > 100


@pytest.mark.parametrize("scope", ["all", "late"])
def test_bfloat16_states_are_reduced_without_further_rounding(low, scope):
    """The states of the bfloat16 model itself, seen by plain hooks and reduced in float64."""
    _, batch = cases(None)
    report = examine(low, batch)
    _, seen = eager_decoder.hooked(low, **batch)
    states = {part: [list(X.double().numpy()) for X in seen[part]] for part in ("out", "mid")}
    compare_stream(report, states, scope, 1e-3, 1e-6)
