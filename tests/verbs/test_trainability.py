"""Maps of what trains: pointwise the phases, the architecture's own place, memory, and refusals."""

import tracemalloc

import numpy as np
import pytest

from fullrank import Architecture
from fullrank.errors import FullrankError, TheoryError
from fullrank.theory.giorlandino_goldt_trainability import phases
from fullrank.verbs.trainability import own_value, trainability

PLAIN = Architecture(depth=6, width=128, heads=4, context=64, placement="post", std_v=0.15, std_o=0.15)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_plane_is_the_phases_point_by_point(mask):
    one = PLAIN.with_(mask=mask)
    scales, stds = np.geomspace(0.1, 5, 5), np.geomspace(0.01, 0.5, 4)
    found = trainability(one, vary={"residual_scale": scales, "qk_std": stds})
    assert found.phase.shape == (5, 4)
    assert len(set(found.phase.ravel())) > 1
    for i, scale in enumerate(scales):
        for j, std in enumerate(stds):
            point = phases(one.with_(residual_scale=float(scale), qk_std=float(std)))
            assert found.phase[i, j] == point.phase
            assert found.similarity[i, j] == pytest.approx(float(point.similarity), rel=1e-9, abs=1e-12)
            assert found.gauge[i, j] == pytest.approx(float(point.gauge), rel=1e-9)


@pytest.mark.parametrize(("name", "values"), [("depth", [1, 4, 9]), ("context", [8, 64, 500]), ("heads", [1, 2, 8])])
def test_a_line_over_a_whole_field_is_the_phases_of_each(name, values):
    found = trainability(PLAIN, vary={name: values})
    for value, similarity in zip(values, found.similarity, strict=True):
        assert similarity == pytest.approx(float(phases(PLAIN.with_(**{name: value})).similarity), rel=1e-9)


def test_memory_does_not_grow_with_depth():
    peaks = []
    vary = {"residual_scale": np.geomspace(0.1, 2, 20), "qk_std": np.geomspace(0.01, 0.2, 20)}
    for depth in (4, 4, 64):  # the first fills caches
        tracemalloc.start()
        trainability(PLAIN.with_(depth=depth, mask="causal"), vary=vary)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


def test_the_architectures_own_place_is_marked_and_has_the_phase_of_the_nearest_point():
    found = trainability(PLAIN, vary={"residual_scale": np.geomspace(0.1, 10, 21), "qk_std": [0.01, 0.02, 0.04]})
    assert found.axes[0].own == 1
    assert found.axes[0].nearest() == 10
    assert found.here == found.phases[int(phases(PLAIN).phase)]
    assert trainability(PLAIN, vary={"qk_std": [0.1, 0.2]}).here is None


def test_shorthands_have_a_place_where_the_map_cannot_tell_what_they_stand_for_apart():
    uneven = PLAIN.with_(std_v=0.02, std_o=0.08)
    assert own_value(uneven, "value_std") == pytest.approx(0.04)
    same = phases(uneven.with_(value_std=0.04))
    assert float(same.similarity) == pytest.approx(float(phases(uneven).similarity), rel=1e-12)
    assert own_value(PLAIN.with_(std_up=0.02, std_down=0.08), "mlp_std") is None
    assert own_value(PLAIN.with_(std_up=0.0200, std_down=0.0201), "mlp_std") == pytest.approx(0.02005)
    assert own_value(PLAIN.with_(attention_branch=0.5), "residual_scale") is None
    assert own_value(PLAIN, "window") is None


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({}, "names 0 fields: a map has one or two"),
        ({"depth": [1, 2], "context": [8, 9], "width": [8, 16]}, "names 3 fields"),
        ({"residual": [0.1, 1]}, "names 'residual': what can vary is residual_scale, skip_scale, qk_std"),
        ({"mask": [0, 1]}, "names 'mask'"),
        ({"qk_std": [0.1]}, "give it a list of two finite numbers or more"),
        ({"qk_std": ["a", "b"]}, "give it a list of two finite numbers or more"),
        ({"qk_std": [0.1, np.nan]}, "give it a list of two finite numbers or more"),
        ({"qk_std": [-0.1, 0.1]}, "must be 0 or a positive number"),
        ({"context": [1, 64]}, "context=1 must be a whole number of 2 or more"),
    ],
)
def test_what_cannot_vary_is_answered_in_one_sentence(vary, says):
    with pytest.raises(FullrankError) as error:
        trainability(PLAIN, vary=vary)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_architecture_that_the_map_does_not_speak_of_is_refused_with_the_reason():
    with pytest.raises(TheoryError, match="says nothing of this architecture: its norm is taken over the batch"):
        trainability(PLAIN.with_(norm="batchnorm"), vary={"qk_std": [0.1, 0.2]})
