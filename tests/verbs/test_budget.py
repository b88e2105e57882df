"""A time budget: what is given up first, what never, and how far it is overdrawn. The clock is made up."""

import functools
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import fullrank
from alike import differences
from fullrank.errors import BatchError, ShapeError
from fullrank.measure import SpectrumObserver, StreamObserver
from fullrank.measure.budget import Budget, Costs, EvenHeads, Sampling, sampling
from fullrank.verbs.batches import as_calls

LAYERS, HEADS, SEQUENCES = 3, 4, 6
COSTS = Costs(sequence=2.0, head=1.0, sequences=8, spectra=4, heads=12)


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@functools.cache
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": 16}
        return LlamaModel(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=50, pad_token_id=None, **sizes)).eval()


def batch():
    return {"input_ids": torch.randint(50, (SEQUENCES, 20), generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def clock(monkeypatch):
    """A state of the stream costs a second a sequence; a head's spectrum ten, unless a test says otherwise."""
    clock = Clock()
    clock.of_a_head, clock.of_a_state = 10.0, 1.0
    see_state, see_call = StreamObserver.see, SpectrumObserver.see

    def state(self, event):
        clock.now += clock.of_a_state * event.value.shape[0] if event.part == "out" and event.site == "stream" else 0
        see_state(self, event)

    def spectrum(self, event):
        heads = HEADS if self._heads is None else len(self._heads.of(event.stack, event.layer, HEADS))
        clock.now += clock.of_a_head * heads * min(event.attention.shape[0], self._sequences)
        see_call(self, event)

    monkeypatch.setattr(StreamObserver, "see", state)
    monkeypatch.setattr(SpectrumObserver, "see", spectrum)
    monkeypatch.setattr("fullrank.verbs.examine.Budget", functools.partial(Budget, clock=clock))
    return clock


def examined(seconds, **options):
    return fullrank.examine(model(), batch(), seconds=seconds, **options)


def counts(report, metric):
    return {row.n for row in report.rows.where(metric=metric).rows}


def said(report):
    return " ".join(note for note in report.about["notes"] if "time budget" in note)


# ---------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (64, Sampling(8, 4)),
        (63, Sampling(8, 1)),
        (28, Sampling(8, 1)),
        (27, Sampling(8, 1, 11)),
        (17, Sampling(8, 1, 1)),
        (16.9, Sampling(8, 0)),
        (16, Sampling(8, 0)),
        (15, Sampling(7, 0)),
        (1, Sampling(1, 0)),
        (-5, Sampling(1, 0)),
    ],
)
def test_spectra_of_sequences_then_of_heads_then_all_of_them_then_sequences_are_given_up(seconds, expected):
    assert sampling(COSTS, seconds) == expected


def test_heads_that_the_user_named_are_not_thinned_out():
    assert sampling(COSTS, 27, heads_chosen=True) == Sampling(8, 0)


def test_more_time_never_takes_less():
    plans = [sampling(COSTS, seconds / 4) for seconds in range(-10, 300)]
    amounts = [(p.sequences, p.spectra * (p.heads or COSTS.heads)) for p in plans]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(amounts))


def test_heads_are_spread_evenly():
    assert EvenHeads(1).of("decoder", 1, 12) == (6,)
    assert EvenHeads(3).of("decoder", 1, 12) == (2, 6, 10)
    assert EvenHeads(12).of("decoder", 1, 12) == tuple(range(12))
    assert EvenHeads(5).of("decoder", 1, 3) == (0, 1, 2)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(seconds):
    with pytest.raises(ShapeError, match="seconds="):
        examined(seconds)


def test_contexts_are_not_cut_by_a_budget():
    with pytest.raises(BatchError, match="contexts="):
        examined(10, contexts=[8, 16])


# ---------------------------------------------------------------- what is taken


def test_with_time_enough_the_report_is_the_one_without_a_budget(clock):
    report, plain = examined(1e6), fullrank.examine(model(), batch())
    assert not differences(report, plain, tolerance=2e-5, absolute=1e-6)
    assert [one.key for one in report.spectra] == [one.key for one in plain.spectra]
    for one, other in zip(report.spectra, plain.spectra, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-4, abs=1e-5)
    assert report.about["input"] == plain.about["input"]
    assert said(report) == ""


def test_spectra_of_one_sequence_where_those_of_four_do_not_fit(clock):
    report = examined(200)  # 6 · 4 states, and 120 for the spectra of a sequence
    assert counts(report, "attention_s2") == {1}
    assert counts(report, "similarity") == {SEQUENCES}
    assert "singular values of 1 instead of 4 sequences" in said(report)


def test_spectra_of_fewer_heads_where_all_do_not_fit(clock):
    report = examined(120)
    rows = report.rows.where(metric="attention_s2", layer=1).rows
    assert 0 < len(rows) < HEADS
    assert "instead of 4 heads of each call" in said(report)
    assert counts(report, "entropy") == {SEQUENCES}


def test_no_spectra_where_none_fit(clock):
    clock.of_a_head = 500.0
    clock.now = 0.0
    report = examined(560)
    assert report.rows.where(metric="attention_s2").rows == ()
    assert counts(report, "similarity") == {SEQUENCES}
    assert "no singular values" in said(report)


def test_fewer_sequences_where_not_all_fit(clock):
    report = examined(20, spectrum=False)  # 2 for the trial, 4 for each sequence
    (read,) = counts(report, "similarity")
    assert read == 4
    assert counts(report, "entropy") == {read}
    assert report.about["input"]["sequences"] == read
    assert report.about["input"]["tokens"] == 20 * read
    assert f"{read} instead of {SEQUENCES} sequences" in said(report)


def test_one_sequence_is_always_read_to_its_end(clock):
    report = examined(0.001)
    assert counts(report, "similarity") == {1}
    known = {row.layer for row in report.rows.where(metric="entropy").rows if row.value is not None}
    assert known == set(range(1, LAYERS + 1))
    assert report.rows.where(metric="attention_s2").rows == () or counts(report, "attention_s2") == {0}


# ---------------------------------------------------------------- where the estimate was wrong


def test_spectra_that_take_longer_than_thought_are_left_out_from_the_next_call_on(clock, monkeypatch):
    dear = SpectrumObserver.see

    def later(self, event):
        clock.now += 1e4 if event.layer == 2 else 0.0
        dear(self, event)

    monkeypatch.setattr(SpectrumObserver, "see", later)
    report = examined(1000)
    by_layer = {layer: report.rows.where(metric="attention_s2", layer=layer).rows for layer in range(1, LAYERS + 1)}
    assert all(by_layer.values())
    assert all(row.value is not None for layer in (1, 2) for row in by_layer[layer])
    assert all(row.value is None and "time budget" in row.note for row in by_layer[3])
    assert "no singular values of 1 attention calls" in said(report)
    assert counts(report, "similarity") == {1}  # no other sequence was begun
    assert f"1 of {SEQUENCES} sequences when it ran out" in said(report)


def test_a_sequence_that_is_running_is_left_after_the_block_at_hand_and_thrown_away(clock, monkeypatch):
    see = StreamObserver.see
    seen = []

    def slower(self, event):
        if (event.stack, event.site, event.part) == ("decoder", "stream", "out"):
            seen.append(event.layer)
            if len(seen) > 2 * (1 + 1) + 2 * (LAYERS + 1) + 2:  # two trials, two sequences, and into the third chunk
                clock.now += 1e4
        see(self, event)

    monkeypatch.setattr(StreamObserver, "see", slower)
    report = examined(1e3, spectrum=False)
    assert counts(report, "similarity") == {2}
    assert counts(report, "update_share") == {2}
    assert seen[-1] == 2  # of three blocks: one more block, and not the rest
    assert f"2 of {SEQUENCES} sequences when it ran out" in said(report)


@pytest.mark.parametrize(
    ("more", "of"), [({}, "1 sequence"), ({"position_ids": torch.arange(20)[None]}, f"{SEQUENCES} sequences")]
)
def test_gradients_for_which_no_time_is_left_are_of_what_was_read_first(clock, more, of):
    report = fullrank.examine(model(), batch() | more, seconds=0.001, spectrum=False, gradients=True)
    assert f"gradients of {of} only, through one random projection." in said(report)
    assert report.about["gradients"].startswith("1 random projection")


def test_the_model_is_left_as_it_was_where_a_forward_was_left(clock):
    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    examined(5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model().state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model().modules())


# ---------------------------------------------------------------- dividing a batch


def test_a_batch_is_divided_where_every_tensor_has_its_sequences_first():
    ids = batch()["input_ids"]
    masks = torch.ones_like(ids)
    (call,) = as_calls(model(), {"input_ids": ids, "attention_mask": masks})
    assert call.divisible
    part = call.part(1, 3)
    assert torch.equal(part.kwargs["input_ids"], ids[1:3])
    assert part.real.shape == part.token_ids.shape == (2, 20)
    (shared,) = as_calls(model(), {"input_ids": ids, "position_ids": torch.arange(20)[None]})
    assert not shared.divisible


def test_a_batch_that_cannot_be_divided_is_read_whole_and_several_are_counted_as_batches(clock):
    one = batch() | {"position_ids": torch.arange(20)[None]}
    report = fullrank.examine(model(), [one, one, one], seconds=40, spectrum=False)
    assert counts(report, "similarity") == {SEQUENCES}
    assert "1 instead of 3 batches" in said(report)
