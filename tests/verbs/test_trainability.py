"""Maps of what trains: pointwise the phases, the architecture's own place, memory, and refusals."""

import tracemalloc

import numpy as np
import pytest

from fullrank import Architecture
from fullrank.errors import ArchitectureError, FullrankError, TheoryError
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


def test_whole_fields_are_drawn_at_the_whole_numbers_that_the_axis_says():
    found = trainability(PLAIN, vary={"depth": np.linspace(1, 4, 50), "qk_std": [0.1, 0.02]})
    assert found.axes[0].values.tolist() == [1, 2, 3, 4]
    assert found.axes[1].values.tolist() == [0.1, 0.02]  # a field of fractions keeps its own
    assert found.phase.shape == (4, 2)
    rounded = trainability(PLAIN, vary={"context": [99.6, 8.4, 7.7]})
    assert rounded.axes[0].values.tolist() == [8, 100]
    for at, context in enumerate((8, 100)):
        assert rounded.similarity[at] == pytest.approx(float(phases(PLAIN.with_(context=context)).similarity), rel=1e-9)


def test_every_point_of_widths_and_heads_is_the_architecture_that_has_both():
    vary = {"heads": [5, 10], "width": [100, 200]}  # neither goes with the other of PLAIN
    found = trainability(PLAIN, vary=vary)
    apart = trainability(PLAIN.with_(head_width=20), vary=vary)  # heads that stay as wide as they are
    for i, heads in enumerate(vary["heads"]):
        for j, width in enumerate(vary["width"]):
            one = PLAIN.with_(heads=heads, width=width)
            wide = PLAIN.with_(head_width=20).with_(heads=heads, width=width)
            assert (one.head_width, wide.head_width) == (width // heads, 20)
            for map_, point in ((found, phases(one)), (apart, phases(wide))):
                assert map_.similarity[i, j] == pytest.approx(float(point.similarity), rel=1e-9)
                assert map_.gauge[i, j] == pytest.approx(float(point.gauge), rel=1e-9)


def test_correlations_are_held_against_the_contexts_beside_them_and_not_against_the_architectures_own():
    found = trainability(PLAIN, vary={"context": [4, 8], "correlation": [-0.1, 0.5]})
    assert found.similarity[1, 0] == pytest.approx(
        float(phases(PLAIN.with_(context=8, correlation=-0.1)).similarity), rel=1e-9
    )
    with pytest.raises(ArchitectureError, match=r"correlation=-0\.1 is impossible among 64 tokens"):
        trainability(PLAIN, vary={"context": [4, 64], "correlation": [-0.1, 0.5]})


def test_the_scale_of_logits_follows_the_width_of_heads_where_it_did():
    widths = [16, 64]
    plain = {"depth": 6, "width": 128, "heads": 4, "context": 64, "std_q": 0.1}
    for given in ({}, {"logit_scale": 0.125}):  # 1/√64, and PLAIN's heads are 32 wide
        found = trainability(Architecture(**plain, **given), vary={"head_width": widths, "heads": [2, 4]})
        for i, width in enumerate(widths):
            for j, heads in enumerate((2, 4)):
                one = Architecture(**plain | {"head_width": width, "heads": heads} | given)
                assert found.gauge[i, j] == pytest.approx(float(phases(one).gauge), rel=1e-9)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_windows_that_cut_nothing_off_are_none_beside_others_that_do(mask):
    one = PLAIN.with_(mask=mask, qk_std=0.1)
    windows, contexts = [8, 64, 100], [16, 64, 256]
    found = trainability(one, vary={"window": windows, "context": contexts})
    alone, shut = trainability(one, vary={"window": windows}), one.with_(window=32)
    for i, window in enumerate(windows):
        point = phases(one.with_(window=window))
        assert alone.similarity[i] == pytest.approx(float(point.similarity), rel=1e-9)
        assert alone.gauge[i] == pytest.approx(float(point.gauge), rel=1e-9)
        for j, context in enumerate(contexts):
            point = phases(one.with_(window=window, context=context))
            assert found.similarity[i, j] == pytest.approx(float(point.similarity), rel=1e-9)
            assert found.phase[i, j] == point.phase
    for value, similarity in zip(contexts, trainability(shut, vary={"context": contexts}).similarity, strict=True):
        assert similarity == pytest.approx(float(phases(shut.with_(context=value)).similarity), rel=1e-9)


def test_an_architecture_without_an_mlp_is_given_those_of_the_axis():
    found = trainability(PLAIN.with_(mlp_width=0, placement="pre", mlp_branch=5.0), vary={"mlp_width": [64, 512]})
    one = PLAIN.with_(mlp_width=64, placement="pre", mlp_branch=5.0)
    assert found.similarity[0] == pytest.approx(float(phases(one).similarity), rel=1e-9)
    assert found.similarity[0] != found.similarity[1]


@pytest.mark.parametrize(
    ("changed", "name", "values"),
    [
        ({"qk_norm": True}, "qk_std", [0.01, 0.3]),
        ({"qk_norm": True}, "std_k", [0.01, 0.3]),
        ({}, "std_gate", [0.01, 0.3]),
        ({"mlp_width": 0}, "mlp_std", [0.01, 0.3]),
        ({"mlp_width": 0}, "mlp_branch", [0.1, 3]),
        ({}, "window", [64, 100]),
        ({"placement": "peri"}, "value_std", [0.01, 0.3]),
    ],
)
def test_a_field_without_effect_on_this_architecture_is_said_to_have_none(changed, name, values):
    one = PLAIN.with_(**changed)
    assert f"{name} makes no difference here" in trainability(one, vary={name: values}).said
    both = trainability(one, vary={"std_o" if name != "value_std" else "attention_branch": [0.1, 0.2], name: values})
    assert both.idle() == (name,)


def test_fields_that_matter_are_not_said_to_make_no_difference():
    used = {"qk_std": [0.1, 0.3], "std_gate": [0.01, 0.3], "mlp_std": [0.01, 0.3], "window": [8, 32], "depth": [2, 4]}
    for name, values in used.items():
        assert trainability(PLAIN.with_(gated=True), vary={name: values}).idle() == ()
    assert "it has no window." in trainability(PLAIN, vary={"window": [8, 32]}).said


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
        ({"heads": [4, 5, 8]}, "heads=5 do not divide width=128: give a number that does, or head_width"),
        ({"width": [96, 128], "heads": [2, 3]}, "heads=3 do not divide width=128"),
        ({"depth": [1.2, 0.8]}, "vary= gives depth, a whole number, 1 alone: give it two of them or more"),
        ({"mlp_width": [0, 64]}, "vary= gives mlp_width 0 among others, and no MLP is another block"),
        ({"qk_std": [0.1, 0.2], "std_q": [0.1, 0.2]}, "names qk_std and std_q, which qk_std stands for"),
        ({"mlp_branch": [0.1, 1], "residual_scale": [0.1, 1]}, "names residual_scale and mlp_branch, which residual_"),
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
