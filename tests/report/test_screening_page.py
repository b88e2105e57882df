"""The page of a screening in a real browser: silent, self-contained, readable at two widths."""

import pytest
from selenium.webdriver.support.ui import Select

from fullrank.report import Screening
from report.screened_sample import screening
from report.test_page import BREAKOUTS, Page


@pytest.fixture(scope="module", params=[0, 150])
def made(request):
    return screening(steps=request.param)


@pytest.fixture(scope="module")
def page(made, browser, tmp_path_factory):
    opened = Page(browser, made.save_html(tmp_path_factory.mktemp("screened") / "screening.html"))
    opened.until(lambda: opened.all("#profiles .main-svg"))
    return opened


@pytest.mark.browser
def test_the_page_is_silent_and_asks_nothing_of_the_network(page):
    assert page.errors() == []
    assert page.requests() == [page.uri]


@pytest.mark.browser
def test_the_page_says_what_came_out_and_lists_every_variant_in_order(page, made):
    assert page.one(".sentence").text == made.said
    rows = page.all(".screened tbody th[scope=row]")
    assert [row.text.splitlines()[0] for row in rows] == [row.variant for row in made.rows]
    groups = [one.text for one in page.all(".screened .group th")]
    assert bool(groups) != made.ranked
    ranks = [one.text for one in page.all(".screened td[data-of=rank]")]
    assert ranks == ([str(made.rank(row) or "–") for row in made.rows] if made.ranked else [])
    assert bool(page.all("#differences .main-svg")) == made.ranked
    assert "registers: it adds image tokens" in page.one(".notes").text


@pytest.mark.browser
def test_another_metric_is_drawn_when_it_is_chosen(page, made):
    first = page.plotted("profiles")
    assert {trace["name"] for trace in first["data"]} == {*made.profiles, "own initialisation"}
    Select(page.one("#metric")).select_by_value("rms")
    page.until(lambda: page.plotted("profiles")["layout"]["yaxis"]["title"]["text"].startswith("rms"))
    assert page.plotted("profiles")["data"][0]["y"] != first["data"][0]["y"]
    assert page.one("#meaning").text


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.refresh()
        page.until(lambda: page.all("#profiles .main-svg"))
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        inside = browser.execute_script(
            "const {scrollWidth, clientWidth} = arguments[0]; return [scrollWidth, clientWidth]", page.one(".scroll")
        )
        assert wide <= width
        assert inside[0] <= inside[1]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_text_of_others_stays_text(browser, tmp_path):
    made = screening(steps=0)
    evil = Screening.of(made.rows, about={"model": BREAKOUTS[0]}, profiles=made.profiles, notes=BREAKOUTS)
    opened = Page(browser, evil.save_html(tmp_path / "evil.html"))
    opened.until(lambda: opened.all("#profiles .main-svg"))
    assert opened.one("h1").text == BREAKOUTS[0]
    assert opened.errors() == []
    assert not opened.all(".notes img")
