"""The page of a prediction, alone and over a measurement, in a real browser."""

import pytest

import fullrank
from fullrank import Architecture
from fullrank.report import Report
from fullrank.table import Row, Table
from report.test_page import Page

pytestmark = pytest.mark.browser
ONE = Architecture(depth=4, width=64, heads=4, context=64, std_v=0.2, std_o=0.2, correlation=0.1, name="small")


@pytest.fixture(scope="module")
def predicted():
    return fullrank.predict(ONE)


@pytest.fixture(scope="module")
def measured():
    rows = [
        Row("encoder", layer, "stream", "out", metric, value, n=4, stderr=0.01)
        for layer in range(5)
        for metric, value in (("similarity", 0.1 + 0.1 * layer), ("token_energy", 0.9 - 0.1 * layer))
    ]
    return Report(Table(rows), {"model": "small", "stacks": [{"name": "encoder"}]})


def drawn(page, name):
    page.until(lambda: page.all(f"#{name} .main-svg"))
    return page.plotted(name)["data"]


def test_it_opens_with_the_architecture_the_standings_the_answers_and_who_was_left_out(browser, predicted, tmp_path):
    page = Page(browser, predicted.save_html(tmp_path / "p.html"))
    text = page.one("#overview").text
    said = predicted.prediction
    order = [
        said.sentence[:30],
        "before anything is measured",
        said.standings[0].key,
        said.answers[-1].says,
        "Left out",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert said.left_out[0].because[0] in text
    assert len(page.all(".card.answer")) == len(said.answers)
    assert "Heads" not in page.one("nav").text
    assert page.errors() == []


def test_theories_are_dotted_and_the_first_is_the_heaviest(browser, predicted, tmp_path):
    page = Page(browser, predicted.save_html(tmp_path / "p.html"))
    lines = drawn(page, "opening-theories-0")
    keys = [one.key for one in predicted.prediction.standings]
    assert [line["name"] for line in lines] == [key for key in keys if key in {line["name"] for line in lines}]
    assert {line["line"]["dash"] for line in lines} == {"dot"}
    assert lines[0]["line"]["width"] == max(line["line"]["width"] for line in lines)
    assert page.errors() == []


def test_over_a_measurement_the_theory_is_dotted_in_its_own_colour(browser, measured, predicted, tmp_path):
    both = measured.overlay(predicted, labels=["measured", "predicted"])
    page = Page(browser, both.save_html(tmp_path / "o.html"))
    solid, *dotted = drawn(page, "opening-depth-0")
    assert solid["name"] == "this model"
    assert dotted[0]["name"] == predicted.primary
    assert {line["line"]["dash"] for line in dotted} == {"dot"}
    assert solid["line"]["color"] not in {line["line"]["color"] for line in dotted}
    assert "errs by" in page.one(".agreement").text
    page.tab("depth")
    profiles = {trace["name"]: trace["line"] for trace in page.plotted("profile")["data"]}
    mine = next(line for name, line in profiles.items() if predicted.primary in name)
    assert (mine["dash"], mine["color"]) == ("dot", dotted[0]["line"]["color"])
    assert page.errors() == []
