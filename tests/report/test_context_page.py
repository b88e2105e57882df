"""The section on contexts in a real browser."""

import pytest
from selenium.webdriver.support.ui import Select

from fullrank.report import Report
from fullrank.report.trends import steepest
from fullrank.table import Table, context_of
from report.synthetic import with_contexts
from report.test_page import Page

pytestmark = pytest.mark.browser
CONTEXTS = (64, 256, 1024)


@pytest.fixture(scope="module")
def made():
    return with_contexts(layers=4, heads=3, contexts=CONTEXTS)


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save_html(tmp_path_factory.mktemp("page") / "contexts.html")


@pytest.fixture
def page(browser, saved):
    opened = Page(browser, saved)
    opened.one("#tab-contexts").click()
    opened.until(lambda: opened.all("#by-context .main-svg"))
    yield opened
    assert opened.errors() == []
    assert set(opened.requests()) <= {opened.uri}


def test_without_contexts_there_is_no_such_section(browser, made, tmp_path):
    plain = Report(rows=Table(row for row in made.rows if context_of(row.scope) is None), about=made.about)
    page = Page(browser, plain.save_html(tmp_path / "plain.html"))
    assert page.all("#tab-contexts") == page.all("#contexts") == []
    page.tab("depth")
    assert page.errors() == []


def test_lines_and_slopes_follow_the_selector(page, made):
    page.choose("contexts", "metric", "similarity")
    drawn = [one for one in page.plotted("by-context")["data"] if one.get("mode") == "lines+markers"]
    where = {"metric": "similarity", "layer": 2, "site": "stream", "part": "out"}
    expected = [made.rows.where(scope=f"late+context={c}", **where).rows[0].value for c in CONTEXTS]
    assert drawn[2]["y"] == [pytest.approx(value, rel=1e-4) for value in expected]
    slopes = [one for one in made.context_slopes if one.metric == "similarity"]
    assert page.plotted("slopes")["data"][0]["y"] == [pytest.approx(one.per_doubling, rel=1e-4) for one in slopes]
    page.choose("contexts", "metric", "entropy")
    cells = page.plotted("slopes")["data"][0]
    assert cells["type"] == "heatmap"
    slope = next(s for s in made.context_slopes if (s.metric, s.layer, s.head, s.scope) == ("entropy", 3, 1, "late"))
    assert cells["z"][2][1] == pytest.approx(slope.per_doubling, rel=1e-4)
    assert "95 % interval" in cells["customdata"][2][1][1]
    assert "mean over heads" in page.one("#by-context").text


def test_scope_and_logarithmic_axis_are_chosen(page):
    page.choose("contexts", "metric", "entropy")
    page.choose("contexts", "scope", "late+no-sink")
    assert "late+no-sink" in page.plotted("by-context")["layout"]["yaxis"]["title"]["text"]
    page.one("#contexts input[name=log]").click()
    assert page.plotted("by-context")["layout"]["yaxis"]["type"] == "log"
    page.one("#contexts input[name=log]").click()
    page.choose("contexts", "scope", "late")


def test_the_steepest_are_listed_in_words(page, made):
    rows = [row.text for row in page.all(".steepest tbody tr")]
    expected = steepest(made.context_slopes, made.rows)
    assert len(rows) == len(expected) > 3
    for row, trend in zip(rows, expected, strict=True):
        assert row == f"{trend.slope.metric} {trend.where} {trend.said}"
    assert "intervals leave out 0" in page.one("#contexts").text


def test_depth_and_heads_keep_to_whole_sequences_and_the_table_has_all(page, made):
    for tab in ("depth", "heads"):
        page.tab(tab)
        scopes = [one.text for one in Select(page.one(f"#{tab} select[name=scope]")).options]
        assert scopes
        assert not any("context" in scope for scope in scopes)
    page.tab("table")
    page.one("#table input[name=find]").send_keys("context=1024")
    count = sum(context_of(row.scope) == 1024 for row in made.rows)
    page.until(lambda: page.one("#table .count").text.startswith(f"{count:,} of"))


def test_on_a_phone_nothing_is_wider_than_the_screen(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.driver.refresh()
        page.one("#tab-contexts").click()
        page.until(lambda: page.all("#by-context .main-svg"))
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.refresh()
