"""The page of several variants in a real browser."""

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from fullrank.report import Variants
from fullrank.report.wording import number
from report.test_page import Page
from report.test_variants import LABELS, variant

pytestmark = pytest.mark.browser
EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def made():
    reports = [variant(index) for index in range(3)]
    return Variants.of(reports, LABELS, failed=[("checkpoint-2000", "it has no weights.")], notes=["A note."])


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save_html(tmp_path_factory.mktemp("page") / "series.html")


@pytest.fixture
def page(browser, saved):
    opened = Page(browser, saved)
    yield opened
    assert opened.errors() == []
    assert set(opened.requests()) <= {opened.uri}


def test_the_page_opens_with_what_failed_and_what_changed(page, made):
    text = page.one("#overview").text
    assert "checkpoint-2000: it has no weights." in text
    assert "A note." in text
    lines = [row.text.split() for row in page.all("table.changes tbody tr")]
    changes = made.changes(most=12)
    assert [line[0] for line in lines] == [change.metric for change in changes]
    assert [line[-2:] for line in lines] == [[number(change.before), number(change.after)] for change in changes]
    assert "token_energy" in [line[0] for line in lines]


def test_every_variant_opens_to_its_own_overview(page):
    details = page.all("details.variant")
    assert [one.find_element(By.TAG_NAME, "h2").text for one in details] == list(LABELS)
    assert not details[1].find_element(By.CSS_SELECTOR, "article").is_displayed()
    details[1].find_element(By.TAG_NAME, "summary").click()
    assert details[1].find_element(By.CSS_SELECTOR, "table.headline").is_displayed()


def test_the_series_section_draws_the_pivot_as_lines_and_as_colours(page, made):
    page.one("#tab-series").click()
    page.until(lambda: page.all("#course .main-svg"))
    page.choose("series", "metric", "similarity")
    frame = made.pivot("similarity")
    drawn = page.plotted("course")["data"]
    assert [one["name"] for one in drawn] == [f"layer {layer}" for layer in frame.columns]
    assert drawn[2]["y"] == pytest.approx(list(frame[2].astype(float)), rel=1e-5)
    page.one("#series input[name=sheet]").click()
    (heat,) = page.plotted("course")["data"]
    assert heat["type"] == "heatmap"
    assert heat["z"][1] == pytest.approx(list(frame.loc[LABELS[1]].astype(float)), rel=1e-5)
    assert not page.one("#series input[name=log]").is_enabled()


def test_heads_are_in_the_series_as_their_mean(page, made):
    page.one("#tab-series").click()
    page.until(lambda: page.all("#course .main-svg"))
    if page.one("#series input[name=sheet]").is_selected():
        page.one("#series input[name=sheet]").click()
    page.choose("series", "metric", "normalized_entropy")
    assert "mean over heads" in page.one("#series select[name=place] option").get_attribute("textContent")
    scope = Select(page.one("#series select[name=scope]")).first_selected_option.text
    drawn = page.plotted("course")["data"]
    assert drawn[0]["y"] == pytest.approx(
        list(made.pivot("normalized_entropy", scope=scope)[1].astype(float)), rel=1e-5
    )


def test_the_other_sections_hold_all_variants(page, made):
    page.tab("depth")
    names = {one["name"].split(" · ")[0] for one in page.plotted("profile")["data"]}
    assert names == set(LABELS)
    page.tab("table")
    assert page.one("#table thead th").text == "variant"
    page.one("#table input[name=find]").send_keys("checkpoint-1000 token_energy")
    assert page.one("#table .count").text.split()[0] == str(len(made.reports[1].rows.where(metric="token_energy")))


def test_one_report_has_no_series_section(browser, made, tmp_path):
    page = Page(browser, made.reports[0].save_html(tmp_path / "one.html"))
    assert page.all("#tab-series") == []
    assert page.errors() == []


def test_labels_reasons_and_notes_cannot_run_as_code(browser, made, tmp_path):
    evil = Variants.of(made.reports[:2], [EVIL, "b"], failed=[(EVIL + "2", EVIL)], notes=[EVIL])
    page = Page(browser, evil.save_html(tmp_path / "evil.html"))
    page.one("#tab-series").click()
    page.until(lambda: page.all("#course .main-svg"))
    assert EVIL in page.one("h1").get_attribute("textContent")
    assert page.errors() == []


def test_on_a_phone_the_colours_of_a_sheet_are_explained_below_it(browser, made, tmp_path):
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, made.save_html(tmp_path / "phone.html"))
        page.one("#tab-series").click()
        page.until(lambda: page.all("#course .main-svg"))
        page.one("#series input[name=sheet]").click()
        bar = page.plotted("course")["layout"]["coloraxis"]["colorbar"]
        assert (bar["orientation"], bar["yanchor"]) == ("h", "top")
        assert bar["y"] < 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.errors() == []


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(page, browser, width):
    browser.set_window_size(width, 900)
    try:
        for tab in ("overview", "series"):
            page.one(f"#tab-{tab}").click()
            scrolls = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not browser.execute_script(scrolls), tab
    finally:
        browser.set_window_size(1280, 900)
