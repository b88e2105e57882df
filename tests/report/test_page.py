"""The page in a real browser: silent, self-contained, and everything on it works."""

import json
import re
from collections import Counter

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from fullrank.report import Report
from fullrank.table import Row, Table
from report.synthetic import report

EVIL = "<script>alert(1)</script>"
BREAKOUTS = (
    EVIL,
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "a\u2028b\u2029c",
    "<img src=x onerror=alert(3)>",
)


@pytest.fixture(scope="module")
def made():
    return report(layers=6, heads=4, tokens=32, floor=4)


class Page:
    """The open page, with the few things the tests do to it."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get_log("browser")
        driver.get_log("performance")
        self.uri = path.as_uri()
        if driver.current_url.split("#")[0] != self.uri:
            driver.get(self.uri)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def tab(self, name):
        self.one(f"#tab-{name}").click()
        plot = {"depth": "#profile", "heads": "#map", "spectra": "#scree"}.get(name)
        if plot:
            self.until(lambda: self.all(f"{plot} .main-svg"))

    def until(self, condition):
        return WebDriverWait(self.driver, 10).until(lambda _: condition())

    def plotted(self, element):
        return self.driver.execute_script(
            "const {data, layout} = document.getElementById(arguments[0]);"
            "return JSON.parse(JSON.stringify({data, layout}))",
            element,
        )

    def choose(self, section, name, value):
        Select(self.one(f"#{section} select[name={name}]")).select_by_visible_text(value)

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent if one["documentURL"].split("#")[0] == self.uri]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save_html(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def page(browser, saved):
    opened = Page(browser, saved)
    yield opened
    assert opened.errors() == []


pytestmark = pytest.mark.browser


def test_the_page_asks_nothing_of_the_network_and_logs_nothing(browser, made, tmp_path):
    path = made.save_html(tmp_path / "report.html")
    page = Page(browser, path)
    for tab in ("depth", "heads", "spectra", "table", "glossary", "overview"):
        page.tab(tab)
    assert page.requests() == [path.as_uri()]
    assert page.driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.errors() == []


def test_tabs_show_one_section_at_a_time_by_mouse_and_by_arrow_keys(page):
    page.tab("overview")
    visible = lambda: [one.get_attribute("id") for one in page.all("[role=tabpanel]") if one.is_displayed()]  # noqa: E731
    assert visible() == ["overview"]
    page.one("#tab-overview").send_keys(Keys.ARROW_RIGHT)
    assert visible() == ["depth"]
    assert page.driver.switch_to.active_element.get_attribute("id") == "tab-depth"
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert visible() == ["glossary"]
    page.tab("table")
    assert visible() == ["table"]
    assert page.one("#tab-table").get_attribute("aria-selected") == "true"


def test_the_overview_states_what_was_examined_and_the_numbers_of_the_table(page, made):
    page.tab("overview")
    text = page.one("#overview").text
    assert "a-small-encoder (BertModel, 22.7 M parameters)" in text
    assert "Attention kernel: scaled_dot_product_attention" in text
    rows = [row.text.split() for row in page.all(".headline tbody tr")]
    assert [row[0] for row in rows] == [str(layer) for layer in range(7)]
    expected = made.pivot("token_energy", site="stream")["out"]
    assert [float(row[1].rstrip("⌊")) for row in rows] == [pytest.approx(value, abs=6e-4) for value in expected]
    assert [row[0] for row in rows if row[1].endswith("⌊")] == ["4"]


def test_verdicts_have_no_section_while_there_are_none(page):
    assert page.all(".verdicts") == []


def test_definitions_appear_by_mouse_and_by_keyboard_and_leave_on_escape(page):
    page.tab("overview")
    term = page.one(".headline .term[data-term=similarity]")
    ActionChains(page.driver).move_to_element(term).perform()
    tip = page.one("#tip")
    assert tip.is_displayed()
    assert "mean cosine over all pairs of different tokens" in tip.text
    assert term.get_attribute("aria-describedby") == "tip"
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert not tip.is_displayed()
    page.one("#tab-overview").send_keys(Keys.TAB)
    for _ in range(20):  # past what the figures above the table have to press
        if "term" in page.driver.switch_to.active_element.get_attribute("class").split():
            break
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert tip.is_displayed()  # the first term of the page has the focus
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_every_metric_has_its_definition_on_the_page(page, made):
    page.tab("glossary")
    names = [one.text for one in page.all(".glossary dt")]
    assert set(names) == {row.metric for row in made.rows}
    assert "No definition" not in page.one("#glossary").text


def test_the_profile_follows_the_selector_and_shows_the_pivot(page, made):
    page.tab("depth")
    page.choose("depth", "metric", "residual")
    plotted = page.plotted("profile")
    drawn = next(one for one in plotted["data"] if one["name"] == "block output")
    assert drawn["y"] == [pytest.approx(v, rel=1e-4) for v in made.pivot("residual", site="stream")["out"]]
    assert "random tokens" in page.one("#profile").text
    assert "not the token mean" in page.one("#depth .meaning").text
    page.one("#depth input[name=log]").click()
    assert page.plotted("profile")["layout"]["yaxis"]["type"] == "log"
    page.one("#depth input[name=log]").click()


def test_small_profiles_choose_the_large_one(page):
    page.tab("depth")
    chosen = next(one for one in page.all(".sparks button") if one.text.startswith("max_to_median"))
    chosen.click()
    assert Select(page.one("#depth select[name=metric]")).first_selected_option.text == "max_to_median"
    pressed = [one.text.split()[0] for one in page.all(".sparks button[aria-pressed=true]")]
    assert pressed == ["max_to_median"]


def test_what_is_missing_is_said_below_its_figure(page):
    page.tab("depth")
    page.choose("depth", "metric", "span_novelty")
    assert "layer 1, 2 · block output: as many tokens as features" in page.one("#depth .missing").text


def test_the_map_follows_metric_and_scope_and_shows_the_pivot(page, made):
    page.tab("heads")
    page.choose("heads", "metric", "sink_mass")
    for scope in ("no-sink", "all"):
        page.choose("heads", "scope", scope)
        drawn = page.plotted("map")["data"][0]
        expected = made.pivot("sink_mass", scope=scope).to_numpy(float)
        assert drawn["z"] == [[pytest.approx(value, rel=1e-4) for value in line] for line in expected]


def cell(page, layer, head):
    """Offset of a cell's middle from the map's middle, in pixels, from Plotly's own axes."""
    return page.driver.execute_script(
        "const map = document.getElementById('map'), {xaxis, yaxis} = map._fullLayout;"
        "const box = map.getBoundingClientRect();"
        "map.scrollIntoView({block: 'center'});"
        "return [Math.round(xaxis._offset + xaxis.d2p(arguments[1]) - box.width / 2),"
        "        Math.round(yaxis._offset + yaxis.d2p(arguments[0]) - box.height / 2)]",
        layer,
        head,
    )


def test_a_head_tells_number_error_and_definition_on_hover_and_opens_its_spectrum_on_click(page, made):
    page.tab("heads")
    page.choose("heads", "metric", "normalized_entropy")
    dx, dy = cell(page, 3, 2)
    ActionChains(page.driver).move_to_element_with_offset(page.one("#map"), dx, dy).perform()
    hover = page.until(lambda: page.all("#map .hoverlayer .hovertext"))[0].text
    assert "layer 3, head 2" in hover
    assert f"{made.pivot('normalized_entropy').loc[3, 2]:.3f}" in hover
    assert "± 0.010 · n = 8" in hover
    assert "Mean over queries" in hover
    ActionChains(page.driver).click().perform()
    page.until(lambda: page.one("#spectra").is_displayed())
    assert page.one("#spectra .said").text.startswith("layer 3, head 2")


def test_a_point_of_a_profile_tells_its_number_on_hover(page, made):
    page.tab("depth")
    page.choose("depth", "metric", "rms")
    point = page.all("#profile .scatterlayer .trace:first-child .point")[2]
    ActionChains(page.driver).move_to_element(point).perform()
    hover = page.until(lambda: page.all("#profile .hoverlayer .hovertext"))[0].text
    assert "layer 2 block output" in hover
    assert "n = 8" in hover


def test_the_scree_follows_layer_and_head_and_draws_the_bulk(page, made):
    page.tab("spectra")
    page.choose("spectra", "layer", "5")
    page.choose("spectra", "head", "1")
    spectrum = next(one for one in made.spectra if one.key == ("encoder", 5, "self", 1))
    drawn = {one["name"].split(",")[0]: one for one in page.plotted("scree")["data"]}
    assert drawn["measured"]["y"] == [pytest.approx(value, rel=1e-4) for value in spectrum.values]
    assert drawn["permuted rows"]["y"] == [pytest.approx(value, rel=1e-4) for value in spectrum.null]
    assert max(drawn["random bulk"]["y"]) == pytest.approx(spectrum.edge, rel=0.05)
    page.one("#spectra input[name=log]").click()
    assert page.plotted("scree")["layout"]["yaxis"]["type"] == "log"
    page.one("#spectra input[name=log]").click()


def values(page, column):
    names = [one.text for one in page.all("#table thead th")]
    return [
        row.find_elements(By.TAG_NAME, "td")[names.index(column)].text
        for row in page.all("#table tbody tr:not(.spacer)")
    ]


def test_the_table_is_searched_and_sorted(page, made):
    page.tab("table")
    find = page.one("#table input[name=find]")
    find.clear()
    find.send_keys("layer 3 sink_mass no-sink")
    assert page.one("#table .count").text.startswith("4 of")
    assert set(values(page, "layer")) == {"3"}
    value = next(one for one in page.all("#table thead button") if one.text == "value")
    value.click()
    ascending = [float(text) for text in values(page, "value")]
    assert ascending == sorted(ascending)
    value.click()
    assert [float(text) for text in values(page, "value")] == ascending[::-1]
    assert value.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    find.clear()
    find.send_keys(" ")
    page.until(lambda: page.one("#table .count").text.startswith(f"{len(made.rows):,} of"))


def test_twenty_thousand_rows_stay_quick_because_only_the_visible_ones_exist(browser, tmp_path):
    rows = [
        Row("decoder", layer, "attention", "self", metric, layer + head / 100, head=head, scope=scope)
        for layer in range(1, 49)
        for head in range(32)
        for metric in ("entropy", "selectivity", "sink_mass", "effective_keys")
        for scope in ("all", "late", "late+no-sink", "no-sink")
    ]
    assert len(rows) > 20_000
    made = Report(rows=Table(rows), about={"model": "large"})
    page = Page(browser, made.save_html(tmp_path / "large.html"))
    page.tab("table")
    assert len(page.all("#table tbody tr")) < 100
    milliseconds = page.driver.execute_script(
        "const find = document.querySelector('#table input[name=find]'), started = performance.now();"
        "find.value = 'entropy'; find.dispatchEvent(new Event('input', {bubbles: true}));"
        "return performance.now() - started"
    )
    assert milliseconds < 1500  # some tens of them on an idle machine
    assert page.one("#table .count").text.startswith("6,144 of")
    page.driver.execute_script("document.querySelector('.sheet').scrollTop = 50000")
    page.until(lambda: values(page, "layer")[0] not in ("", "1"))
    assert len(page.all("#table tbody tr")) < 100
    assert page.errors() == []


def test_the_table_downloads_as_csv_with_every_column(page, made):
    page.tab("table")
    text = page.driver.execute_script(
        "const kept = URL.createObjectURL; let text; "
        "URL.createObjectURL = (blob) => { text = blob.text(); return kept.call(URL, blob); };"
        "HTMLAnchorElement.prototype.click = function () {};"
        "document.querySelector('#table button[name=csv]').click(); URL.createObjectURL = kept;"
        "delete HTMLAnchorElement.prototype.click; return text"
    )
    lines = text.split("\r\n")
    assert lines[0].split(",") == [*made.table.columns, "note"]
    assert len(lines) == 1 + len(made.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKOUTS)
def test_a_model_name_with_markup_is_shown_as_text_everywhere(browser, tmp_path, name):
    made = report(model=name, layers=2, heads=2, tokens=8, stack=name, notes=[name])
    other = report(model="other", layers=2, heads=2, tokens=8, stack=name, seed=1)
    page = Page(browser, made.overlay(other).save_html(tmp_path / "named.html"))
    seen = " ".join(name.split())  # separators of lines are spaces on a page
    assert seen in " ".join(page.driver.title.split())
    assert page.one("h1").text == f"{seen} and other"
    for tab, plot in (("depth", "#profile"), ("heads", "#map"), ("spectra", "#scree")):
        page.tab(tab)
        assert seen in " ".join(page.one(plot).text.split())
    page.tab("table")
    assert seen in page.one("#table").text
    assert page.all("body img, body main script") == []
    assert len(page.all("script")) == 3
    assert page.driver.execute_script("return document.querySelectorAll('svg script, svg image[href*=x]').length") == 0
    assert page.errors() == []


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("/home/me/checkpoints/run-7/step-100", "run-7/step-100"),
        ("org/model", "org/model"),
        ("./checkpoint", "./checkpoint"),
    ],
)
def test_the_heading_is_the_end_of_a_long_path(name, title):
    assert f"<h1>{title}</h1>" in Report(rows=Table(), about={"model": name}).to_html()


def test_a_long_spec_may_be_broken_at_its_signs_and_stays_text():
    html = Report(rows=Table(), about={"model": "arch:llama?a=1&b=<i>,c"}).to_html()
    assert "<h1>arch:llama?<wbr>a=<wbr>1&amp;<wbr>b=<wbr>&lt;i&gt;,<wbr>c</h1>" in html
    assert "<title>arch:llama?a=1&amp;b=&lt;i&gt;,c" in html


@pytest.mark.parametrize(("spectra", "said"), [(0, False), (1, False), (2, True)])
def test_a_choice_of_heads_is_offered_only_where_several_have_spectra(made, spectra, said):
    html = Report(rows=made.rows, about=made.about, spectra=made.spectra[:spectra]).to_html()
    assert ("Click a head" in html) is said


def test_the_source_of_the_page_carries_no_name_as_markup(made):
    html = report(model=EVIL, layers=2, heads=2, tokens=8, stack=EVIL, notes=[EVIL]).to_html()
    assert EVIL not in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL).group(1)
    assert "<" not in data
    assert json.loads(data)["table"]["columns"][1]["distinct"] == [EVIL]


def test_the_page_names_no_address_to_load_from(made):
    html = made.to_html()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']?(https?:)?//", html)
    assert "default-src 'none'" in html


def test_the_page_is_little_more_than_the_drawing_library_and_the_data(made):
    from plotly.offline import get_plotlyjs

    assert len(made.to_html()) < len(get_plotlyjs()) + 400_000


def test_nothing_sticks_out_of_a_phone(browser, made, tmp_path):
    page = Page(
        browser,
        made.overlay(report(layers=6, heads=4, tokens=32, seed=2), labels=("a", "b")).save_html(tmp_path / "p.html"),
    )
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.refresh()
        for tab in ("overview", "depth", "heads", "spectra", "table", "glossary"):
            page.tab(tab)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.errors() == []


def test_an_overlay_shows_both_reports_in_every_section(browser, made, tmp_path):
    other = report(layers=6, heads=4, tokens=32, seed=2, model="another")
    page = Page(browser, made.overlay(other).save_html(tmp_path / "both.html"))
    assert [one.text for one in page.all("#overview h2")] == ["a-small-encoder", "another"]
    page.tab("depth")
    labels = Counter(one["name"].split(" · ")[0] for one in page.plotted("profile")["data"])
    assert labels == {"a-small-encoder": 4, "another": 4}
    page.tab("heads")
    assert len([one for one in page.plotted("map")["data"] if one["type"] == "heatmap"]) == 3
    page.tab("spectra")
    assert len([one for one in page.plotted("scree")["data"] if one["mode"] == "markers"]) == 2
    page.tab("table")
    assert page.one("#table thead th").text == "report"
    assert page.errors() == []


def test_stack_and_attention_selectors_lead_to_their_own_figures(browser, made, tmp_path):
    decoder = report(layers=3, heads=2, tokens=8, causal=True, seed=4)
    both = Report(rows=made.rows.merge(decoder.rows), about=made.about, spectra=made.spectra + decoder.spectra)
    page = Page(browser, both.save_html(tmp_path / "stacks.html"))
    page.tab("depth")
    page.choose("depth", "place", "decoder")
    shown = page.plotted("profile")["data"][0]["y"]
    assert Select(page.one("#depth select[name=scope]")).first_selected_option.text == "late"
    metric = Select(page.one("#depth select[name=metric]")).first_selected_option.text
    expected = decoder.pivot(metric, site="stream", scope="late")["out"]
    assert shown == [pytest.approx(value, rel=1e-4) for value in expected]
    assert "late: the later half of the context" in page.one("#depth .meaning").text
    page.tab("heads")
    page.choose("heads", "place", "decoder · self")
    assert len(page.plotted("map")["data"][0]["y"]) == 3
    page.tab("spectra")
    page.choose("spectra", "place", "decoder · self")
    assert page.one("#spectra .said").text.startswith("layer 1, head 0 · decoder")
    assert page.errors() == []


def test_a_report_without_attention_or_spectra_has_a_page_too(browser, tmp_path):
    rows = [Row("encoder", layer, "stream", "out", "rms", 1.0 + layer) for layer in range(3)]
    page = Page(browser, Report(rows=Table(rows)).save_html(tmp_path / "little.html"))
    for tab in ("depth", "heads", "table", "glossary"):
        page.tab(tab) if tab != "heads" else page.one("#tab-heads").click()
    assert page.all("#tab-spectra") == []
    assert page.errors() == []
    page = Page(browser, Report(rows=Table()).save_html(tmp_path / "empty.html"))
    assert page.errors() == []
