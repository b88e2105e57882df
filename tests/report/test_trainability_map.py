"""A map on the terminal, as JSON, as a table and as figures."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fullrank import Architecture
from fullrank.report.trainability_map import MEANINGS, Axis, TrainabilityMap
from fullrank.theory.giorlandino_goldt_trainability import phases
from report.test_page import Page

PHASES = ("trainable", "rank-collapsed", "entropy-collapsed", "unbounded")


def plane(own=(1.0, 0.02)):
    scale, std = np.geomspace(0.1, 10, 30), np.geomspace(0.001, 1, 12)
    rho = np.broadcast_to(np.linspace(0, 1, 30)[:, None], (30, 12))
    phase = np.where(std > 0.1, 2, np.where(rho > 0.8, 1, 0))
    axes = (Axis("residual_scale", scale, own[0]), Axis("qk_std", std, own[1]))
    return TrainabilityMap("2 blocks ± nothing", axes, PHASES, phase, rho, np.broadcast_to(std, (30, 12)))


def line():
    values = np.linspace(0, 1, 9)
    phase = (values > 0.5).astype(int)
    return TrainabilityMap("2 blocks", (Axis("attention_skip", values, 0.25),), PHASES, phase, values, values)


def shown(one, width, *, plain=False):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.copy()
    options.encoding = "ascii" if plain else "utf-8"
    for part in one.__rich_console__(console, options):
        console.print(part)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("one", [plane(), line()], ids=["plane", "line"])
def test_the_terminal_shows_every_phase_with_its_sign_and_the_own_place(one, width):
    said = shown(one, width)
    assert max(map(len, said.splitlines())) <= width
    for index, (name, share) in enumerate(one.shares().items()):
        assert (f"{'.#*!'[index]} {name}" in said) == (share > 0)
    assert said.count("@") == 2  # in the map and below it
    assert all(axis.name in said for axis in one.axes)
    assert f"the architecture itself is {one.here}" in " ".join(said.split())


def test_a_plain_terminal_is_given_plain_signs():
    assert shown(plane(), 80, plain=True).isascii()
    assert "±" in shown(plane(), 80)


def test_a_place_beyond_the_map_or_of_several_values_is_said_and_not_drawn():
    outside, several = plane((50.0, 0.02)), plane((None, 0.02))
    assert "lies outside (residual_scale 50.0, qk_std 0.020)" in outside.said
    assert "it has several values of residual_scale" in several.said
    for one in (outside, several):
        assert one.here is None
        assert "@" not in shown(one, 80)
        assert not [trace for trace in one.figure().data if trace.name == "this architecture"]


def test_a_field_that_the_architecture_has_not_is_not_said_to_have_several_values():
    window = Axis("window", np.array([8.0, 16.0, 32.0]), None)
    (scale,) = line().axes
    one = TrainabilityMap("2 blocks", (window,), PHASES, np.zeros(3, int), np.arange(3.0), np.arange(3.0))
    assert "has no place on this map: it has no window." in one.said
    both = replace(plane(), axes=(replace(plane().axes[0], own=None), replace(scale, name="window", own=None)))
    assert "it has several values of residual_scale and no window." in both.said


def test_a_field_along_which_nothing_changes_is_said_to_make_no_difference():
    one = plane()
    assert one.idle() == line().idle() == ()
    assert "makes no difference" not in one.said
    still = replace(one, phase=0 * one.phase, gauge=np.ones((30, 12)))  # similarity varies along the first axis alone
    assert still.idle() == ("qk_std",)
    assert "qk_std makes no difference here: all its values give the same phase, similarity and gauge." in still.said


def test_the_meanings_say_what_the_phases_are_decided_by():
    plain = Architecture(depth=2, width=64, heads=4, context=64, std_q=0.5, std_k=0.5, std_v=0.2, std_o=0.2)
    bare = plain.with_(norm="none", placement="none", std_q=0.1, std_k=0.1, mlp_std=0.3)
    names = {"bare": bare, "normed": plain, "qk": plain.with_(qk_norm=True, logit_scale=3.0)}
    phase = {
        (name, *change): PHASES[int(phases(one.with_(**dict([change] if change else []))).phase)]
        for name, one in names.items()
        for change in ((), ("residual_scale", 0.1), ("qk_std", 0.001), ("logit_scale", 0.01))
    }
    saved = {key for key, value in phase.items() if value != "entropy-collapsed"}
    assert saved == {
        *(("bare", "residual_scale", 0.1), ("bare", "qk_std", 0.001), ("bare", "logit_scale", 0.01)),
        *(("normed", "qk_std", 0.001), ("normed", "logit_scale", 0.01), ("qk", "logit_scale", 0.01)),
    }
    said = MEANINGS["entropy-collapsed"]
    assert "smaller W_Q and W_K unless queries and keys are normed" in said
    assert "where blocks read a norm, no residual does" in said

    still = bare.with_(residual_scale=0.0, qk_std=0.0, correlation=0.5)
    assert [PHASES[int(phases(still.with_(input_rms=size)).phase)] for size in (0.99e27, 1.01e27)] == [
        "trainable",
        "unbounded",
    ]
    assert "root mean square after the last block is 1e27 or more" in MEANINGS["unbounded"]
    table = (Path(__file__).parents[2] / "docs" / "predicting.md").read_text(encoding="utf-8")
    assert "| unbounded | `rms` after the last block is 1e27 or more |" in table
    assert "where blocks read a norm, no residual repairs it" in table


def test_the_first_axis_goes_right_and_the_second_up():
    lines = [text for text in shown(plane(), 80).splitlines() if text and text[-1] in ".#*" and len(text) == 40]
    assert lines[0].endswith("*" * 30)  # large standard deviations above
    assert lines[-1][10] == "."
    assert lines[-1][-1] == "#"


def test_the_plane_has_a_colour_for_each_phase_lines_of_similarity_and_the_place():
    figure = plane().figure()
    kinds = [trace.type for trace in figure.data]
    assert kinds[:2] == ["heatmap", "contour"]
    assert np.array_equal(np.asarray(figure.data[0].z), plane().phase.T)
    assert [trace.name for trace in figure.data[2:]] == [*PHASES[:3], "this architecture"]
    assert (figure.data[-1].x, figure.data[-1].y) == ((1.0,), (0.02,))
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]


def test_a_line_shows_the_similarity_over_bands_of_the_phases():
    figure = line().figure()
    assert list(figure.data[0].y) == pytest.approx(np.linspace(0, 1, 9))
    bands = [(shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert bands == [(0.0, 0.625), (0.625, 1.0)]
    assert figure.layout.xaxis.type != "log"


def test_json_and_table_hold_every_point():
    one = plane()
    content = json.loads(one.to_json())
    assert np.array_equal(content["phase"], one.phase)
    assert [axis["own"] for axis in content["axes"]] == [1.0, 0.02]
    assert content["here"] == one.here == "trainable"
    table = one.table
    assert len(table) == 360
    row = table.iloc[5 * 12 + 3]
    assert row["residual_scale"] == one.axes[0].values[5]
    assert row["qk_std"] == one.axes[1].values[3]
    assert row["phase"] == PHASES[one.phase[5, 3]]


def test_the_page_holds_the_words_the_figure_and_what_the_phases_mean_and_no_name_breaks_it(tmp_path):
    one = replace(plane(), architecture="</script><script>alert(1)</script>")
    text = one.save_html(tmp_path / "map.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "Content-Security-Policy" in text
    assert "What trains: residual_scale and qk_std" in text
    assert "the softmax rests on few keys" in text
    assert MEANINGS["rank-collapsed"] in text
    assert "1e27 or more" not in text  # no point is there


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_draws_the_map_within_its_width_and_logs_nothing(browser, tmp_path, width):
    page = Page(browser, plane().save_html(tmp_path / "map.html"))
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        browser.refresh()
        page.until(lambda: page.all("#map .main-svg"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.errors() == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
