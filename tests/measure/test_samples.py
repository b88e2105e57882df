"""One row per place, metric, scope and head, with the standard error over sequences."""

import math

import pytest
import torch

from fullrank.measure.samples import Place, Samples

PLACE = Place("encoder", 1, "attention", "self")


def test_the_row_is_the_mean_over_sequences_and_its_standard_error():
    samples = Samples()
    samples.add(PLACE, "entropy", torch.tensor([1.0, 2.0]))
    samples.add(PLACE, "entropy", torch.tensor([6.0]))
    (row,) = samples.rows()
    assert (row.value, row.n, row.head) == (3.0, 3, None)
    assert row.stderr == pytest.approx(math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3))


def test_one_sequence_has_no_standard_error():
    samples = Samples()
    samples.add(PLACE, "entropy", torch.tensor([1.0]))
    (row,) = samples.rows()
    assert (row.stderr, row.n) == (None, 1)


def test_undefined_sequences_drop_out_and_all_undefined_says_why():
    samples = Samples()
    samples.add(PLACE, "entropy", torch.tensor([[1.0, torch.nan], [3.0, torch.nan]]), undefined="no such row")
    first, second = samples.rows()
    assert (first.value, first.n) == (2.0, 2)
    assert (second.value, second.n, second.note) == (None, 0, "no such row")


def test_positions_are_reduced_to_the_most_frequent_one():
    samples = Samples()
    samples.add(PLACE, "sink_position", torch.tensor([0.0, 7.0, 0.0]), reduce="mode")
    (row,) = samples.rows()
    assert (row.value, row.stderr) == (0.0, None)


def test_what_one_sequence_alone_decides_is_the_largest_of_all_batches_and_has_no_standard_error():
    samples, other = Samples(), Samples()
    samples.add(PLACE, "max_abs", torch.tensor([3.0, torch.nan, 9.0]), reduce="largest")
    other.add(PLACE, "max_abs", torch.tensor([7.0]), reduce="largest")
    samples.merge(other)
    (row,) = samples.rows()
    assert (row.value, row.stderr, row.n) == (9.0, None, 3)
    assert list(samples.series()) == []


def test_one_inexact_batch_makes_the_row_inexact():
    samples = Samples()
    samples.add(PLACE, "entropy", torch.tensor([1.0]), exact=True)
    samples.add(PLACE, "entropy", torch.tensor([1.0]), exact=False)
    assert not samples.rows()[0].exact
