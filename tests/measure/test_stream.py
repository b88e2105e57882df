"""The observer of the stream: scopes, shares that add to one, and merging that loses nothing."""

import math

import pytest
import torch

from fullrank.capture.events import StreamState
from fullrank.measure import StreamObserver


def state(X, layer=0, real=None, stack="encoder", site="stream", part="out"):
    return StreamState(stack, layer, site, part, "blocks.0", X, real)


def number(rows, metric, layer=0, scope="all"):
    (row,) = [r for r in rows if (r.metric, r.layer, r.scope) == (metric, layer, scope)]
    return row


@pytest.fixture
def X(generator):
    return torch.randn(6, 20, 16, generator=generator) + torch.randn(6, 1, 16, generator=generator) + 1


def test_energy_shares_add_to_one_and_equal_their_definition(X):
    observer = StreamObserver()
    real = torch.ones(6, 20, dtype=torch.bool)
    real[2, 12:] = False
    observer.see(state(X, real=real))
    rows = observer.rows()
    tokens = [x[r].double() for x, r in zip(X, real, strict=True)]
    everything = torch.cat(tokens)
    total = everything.square().sum()
    mean = everything.mean(0)
    expected = {
        "shared_energy": len(everything) * mean.square().sum() / total,
        "sequence_energy": sum(len(x) * (x.mean(0) - mean).square().sum() for x in tokens) / total,
        "token_energy": sum((x - x.mean(0)).square().sum() for x in tokens) / total,
    }
    assert sum(float(v) for v in expected.values()) == pytest.approx(1)
    for metric, value in expected.items():
        assert number(rows, metric).value == pytest.approx(float(value), rel=1e-6)
        assert number(rows, metric).stderr > 0


def test_two_batches_merged_equal_one(X):
    whole, first, second = (
        StreamObserver(causal=["decoder"]),
        StreamObserver(causal=["decoder"]),
        StreamObserver(causal=["decoder"]),
    )
    for layer in range(3):
        Y = X * (1 + layer) + layer * X.roll(1, 1)
        whole.see(state(Y, layer, stack="decoder"))
        first.see(state(Y[:2], layer, stack="decoder"))
        second.see(state(Y[2:], layer, stack="decoder"))
    first.merge(second)
    merged = {row.key: row for row in first.rows()}
    assert merged.keys() == {row.key for row in whole.rows()}
    for row in whole.rows():
        other = merged[row.key]
        assert other.n == row.n
        if row.value is None:
            assert other.value is None
            continue
        assert other.value == pytest.approx(row.value, rel=1e-5, abs=1e-7), row
        if row.stderr is not None:
            assert other.stderr == pytest.approx(row.stderr, rel=1e-4, abs=1e-6), row


def test_only_causal_stacks_are_read_over_late_tokens(X):
    observer = StreamObserver(causal=["decoder"])
    observer.see(state(X, stack="decoder"))
    observer.see(state(X, stack="encoder"))
    late = [row for row in observer.rows() if row.scope == "late"]
    assert {row.stack for row in late} == {"decoder"}
    again = StreamObserver()
    again.see(state(X[:, 10:]))
    for metric in ("rms", "similarity", "residual", "token_energy", "centered_stable_rank"):
        assert number(late, metric, scope="late").value == pytest.approx(number(again.rows(), metric).value, rel=1e-6)


def test_changes_are_between_one_state_and_the_next(X):
    observer = StreamObserver()
    observer.see(state(X, 0))
    observer.see(state(X * 1.5, 1))
    rows = observer.rows()
    assert number(rows, "update_share", 1).value == pytest.approx(0.5, rel=1e-5)
    assert number(rows, "neighbour_cosine", 1).value == pytest.approx(1, rel=1e-5)
    assert number(rows, "neighbourhood_overlap", 1).value == pytest.approx(1)
    assert not [row for row in rows if row.metric == "update_share" and row.layer == 0]


def test_a_state_changed_in_place_after_it_was_seen_does_not_change_what_was_seen(X):
    observer = StreamObserver()
    Y = X.clone()
    observer.see(state(Y, 0))
    Y.add_(X)
    observer.see(state(Y, 1))
    assert number(observer.rows(), "update_share", 1).value == pytest.approx(1, rel=1e-5)


def test_identical_tokens_are_marked_at_the_float_floor(generator):
    X = torch.randn(2, 1, 16, generator=generator).expand(2, 8, 16) * (1 + 1e-7)
    observer = StreamObserver()
    observer.see(state(X.contiguous()))
    row = number(observer.rows(), "residual")
    assert row.value < 1e-6
    assert "float floor of float32" in row.note
    assert "float floor of float32" in number(observer.rows(), "token_energy").note
    assert number(observer.rows(), "rms").note == ""


def test_one_sequence_alone_cannot_tell_shared_from_its_own_mean(X):
    observer = StreamObserver()
    observer.see(state(X[:1]))
    rows = observer.rows()
    assert number(rows, "shared_energy").value is None
    assert "two independent sequences" in number(rows, "shared_energy").note
    assert not math.isnan(number(rows, "token_energy").value)


def test_long_sequences_are_sampled_and_say_so(generator):
    X = torch.randn(1, 1500, 8, generator=generator)
    observer = StreamObserver()
    observer.see(state(X, 0))
    observer.see(state(X + 0.1 * torch.randn(1, 1500, 8, generator=generator), 1))
    rows = observer.rows()
    assert not number(rows, "intrinsic_dimension").exact
    assert not number(rows, "neighbourhood_overlap", 1).exact
    assert number(rows, "similarity").exact


def test_samples_are_compared_by_their_means(X):
    observer = StreamObserver()
    observer.see(state(X))
    row = number(observer.rows(), "orthogonality_gap", scope="samples")
    H = X.double().mean(1).T  # (features, samples)
    gram = H.T @ H / H.square().sum() - torch.eye(6, dtype=torch.float64) / 6
    assert row.value == pytest.approx(float(gram.norm()), rel=1e-5)


def test_the_largest_entry_is_that_of_the_sequence_that_has_it_and_its_position_the_most_frequent(X):
    X[:, 3, 2] = 100.0
    X[4, 9, 0] = -500.0
    observer, over_samples = StreamObserver(causal=["decoder"]), StreamObserver()
    observer.see(state(X[:4], stack="decoder"))
    observer.see(state(X[4:], stack="decoder"))
    largest = number(observer.rows(), "max_abs")
    assert (largest.value, largest.stderr, largest.n) == (500.0, None, 6)
    assert number(observer.rows(), "max_abs_position").value == 3
    over_samples.see(StreamState("mlp", 0, "stream", "out", "blocks.0", X[:, 3][None], None, "samples"))
    assert number(over_samples.rows(), "max_abs", scope="samples").value == 100.0
