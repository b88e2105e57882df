"""What theories make of a start that is uncertain, or of tokens that oppose each other."""

import dataclasses
import math

import numpy as np
import pytest

from fullrank.architecture import Architecture
from fullrank.theory.catalogue import THEORIES
from fullrank.theory.giorlandino_goldt import giorlandino_goldt
from fullrank.theory.giorlandino_goldt_course import final
from fullrank.theory.giorlandino_goldt_parameters import parameters_of

FEW = Architecture(depth=2, width=64, heads=4, context=8)
SKIPLESS = {"norm": "none", "placement": "none", "mlp_width": 0, "attention_skip": 0.0}


def similarities(architecture):
    found = giorlandino_goldt.rows(architecture)
    return {(row.layer, row.part): row for row in found if row.metric == "similarity"}


@pytest.mark.parametrize(
    ("correlation", "error", "moved"),
    [(0.4, 0.7, 1.0), (0.7, 1.0, -1 / 7), (0.2, 0.05, 0.25), (0.9, 0.3, 0.6), (1.0, 0.25, 0.75), (-1 / 7, 0.5, 5 / 14)],
)
def test_an_error_of_the_start_moves_it_no_farther_than_cosines_of_its_tokens_go(correlation, error, moved):
    rows = similarities(dataclasses.replace(FEW, correlation=correlation, correlation_stderr=error))
    ends = [similarities(dataclasses.replace(FEW, correlation=at)) for at in (correlation, moved)]
    for place, row in rows.items():
        assert (row.stderr or 0.0) == pytest.approx(abs(ends[1][place].value - ends[0][place].value), abs=1e-12)
    assert rows[0, "out"].stderr == pytest.approx(abs(moved - correlation))


@pytest.mark.parametrize("changed", [{}, SKIPLESS, SKIPLESS | {"mask": "causal"}], ids=["pre", "skipless", "causal"])
@pytest.mark.parametrize(("correlation", "error"), [(0.4, 0.7), (0.99, 1.0), (-1 / 7, 0.5), (-1 / 7, 0.0)])
@pytest.mark.parametrize("one", THEORIES, ids=lambda one: one.key)
def test_at_the_ends_of_what_cosines_can_be_every_theory_that_speaks_gives_numbers(one, correlation, error, changed):
    architecture = dataclasses.replace(FEW, correlation=correlation, correlation_stderr=error, **changed)
    rows = one.rows(architecture) if one.fit(architecture) > 0 else []
    for row in rows:
        assert math.isfinite(row.value)
        assert row.stderr is None or math.isfinite(row.stderr)
        if row.metric == "similarity":
            assert -1 <= row.value <= 1


def test_in_longer_contexts_tokens_oppose_each_other_as_much_as_so_many_can():
    one = dataclasses.replace(FEW, correlation=-0.1)
    contexts = np.array([4, 8, 11, 64, 512])
    assert parameters_of(one, context=contexts).correlation == pytest.approx(np.maximum(-0.1, -1 / (contexts - 1)))
    found = final(one, context=contexts).similarity
    alone = [float(final(one.with_(context=int(context))).similarity) for context in contexts]
    assert found == pytest.approx(alone)
