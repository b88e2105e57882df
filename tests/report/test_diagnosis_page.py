"""What the page opens with, in a real browser: verdict cards, two figures, how the numbers were taken."""

from dataclasses import replace

import pytest
from selenium.webdriver.common.by import By

from fullrank.report import Report, Variants
from fullrank.report.verdict import Checked, Comparison, Diagnosis, Severity
from fullrank.table import Row, Table
from report.diagnosed import diagnosed, diagnosis, verdict
from report.synthetic import report
from report.test_page import BREAKOUTS, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def made():
    return diagnosed()


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save_html(tmp_path_factory.mktemp("diagnosis") / "report.html")


@pytest.fixture
def page(browser, saved):
    opened = Page(browser, saved)
    yield opened
    assert opened.errors() == []


def drawn(page, name):
    """A figure of the opening, when it has been drawn."""
    element = f"opening-{name}-0"
    page.until(lambda: page.all(f"#{element} .main-svg"))
    return page.plotted(element)


def test_the_first_thing_is_a_card_for_every_verdict_gravest_first(page, made):
    cards = page.all("#overview .card")
    assert [card.get_attribute("class") for card in cards] == ["card fail", "card warn", "card note"]
    for card, expected in zip(cards, made.verdicts, strict=True):
        assert card.find_element(By.CSS_SELECTOR, ".head").text.lower() == f"{expected.severity} {expected.name}"
        assert expected.claim in card.text
        assert expected.refuted_by in card.text
        assert card.find_element(By.TAG_NAME, "code").text == expected.command
    assert cards[0].location["y"] < page.one("#overview .facts").location["y"]
    borders = {card.value_of_css_property("border-left-color") for card in cards}
    assert len(borders) == 3


def test_an_effect_is_on_its_card_and_on_no_other(page):
    said = "layer 4 skipped: 0.001 of loss on 3.21 (95 %: −4.0e−4 to 0.003; 8 documents)"
    assert [said in card.text for card in page.all(".card")] == [True, True, False]


def test_the_numbers_of_a_verdict_unfold(page, made):
    card = page.all(".card")[1]
    assert page.all(".card")[2].find_elements(By.TAG_NAME, "details") == []
    details = card.find_element(By.TAG_NAME, "details")
    rows = details.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert not rows[0].is_displayed()
    details.find_element(By.TAG_NAME, "summary").click()
    cells = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
    assert cells == [
        ["update_share", "encoder layer 4", "0.012", "initialisation", "0.310"],
        ["rms", "encoder layer 4", "2.50", "threshold", ""],
    ]
    details.find_element(By.TAG_NAME, "summary").click()


def test_the_stream_is_drawn_over_depth_beside_the_ribbon_of_its_initialisation(page, made):
    data = drawn(page, "depth")["data"]
    line = next(one for one in data if one.get("name") == "this model")
    energy = made.pivot("token_energy", site="stream")["out"]
    assert line["y"] == [pytest.approx(value, rel=1e-4) for value in energy]
    low, high = data[0]["y"], data[1]["y"]
    middle = [(one + other) / 2 for one, other in zip(low, high, strict=True)]
    assert middle == [pytest.approx(value / 2, rel=1e-3) for value in energy]  # the reference of these tests is half
    assert data[1]["fill"] == "tonexty"


def test_the_titles_of_several_stacks_do_not_stand_in_the_legend(browser, tmp_path):
    made, decoder = diagnosed(layers=2), diagnosed(layers=2, stack="decoder")
    both = replace(made, rows=made.rows.merge(decoder.rows), reference=None)
    page = Page(browser, both.save_html(tmp_path / "stacks.html"))
    drawn(page, "depth")
    boxes = lambda selector: page.driver.execute_script(  # noqa: E731
        "return [...document.querySelectorAll('#opening-depth-0 ' + arguments[0])]"
        ".map((one) => [one.textContent, one.getBoundingClientRect().top, one.getBoundingClientRect().bottom])",
        selector,
    )
    named, titles = boxes(".legend .legendtext"), boxes(".annotation-text")
    assert [text for text, *_ in titles] == ["encoder", "decoder"]
    assert named
    assert min(top for _, top, _ in titles) >= max(bottom for *_, bottom in named) - 1
    assert page.errors() == []


def test_every_head_is_on_the_map_with_its_kind(page, made):
    data = drawn(page, "heads")["data"]
    found = {one["name"]: len(one["x"]) for one in data}
    assert found == {"pointer": 6, "mixer": 18}
    pointers = next(one for one in data if one["name"] == "pointer")
    selectivity, entropy = made.pivot("selectivity"), made.pivot("normalized_entropy")
    assert pointers["x"] == [pytest.approx(selectivity.loc[layer, 0], rel=1e-4) for layer in range(1, 7)]
    assert pointers["y"] == [pytest.approx(entropy.loc[layer, 0], rel=1e-4) for layer in range(1, 7)]
    regions = {one["text"] for one in drawn(page, "heads")["layout"]["annotations"]}
    assert {"average", "mixer", "pointer"} <= regions


def test_heads_that_hardly_differ_are_not_drawn_apart(browser, tmp_path):
    rows = [
        Row("decoder", 1, "attention", "self", metric, value + head / 1e4, head=head, n=8)
        for metric, value in (("normalized_entropy", 0.999), ("selectivity", 0.001))
        for head in range(4)
    ]
    page = Page(browser, Report(rows=Table(rows)).save_html(tmp_path / "alike.html"))
    low, high = drawn(page, "heads")["layout"]["xaxis"]["range"]
    assert low < 0
    assert high >= 1
    assert page.errors() == []


def test_a_strip_says_how_the_numbers_were_taken(page):
    text = page.one(".strip").text
    assert "Trained weights: they were read from a checkpoint." in text
    assert "Compared with: BertModel built anew from its configuration, seed 7919." in text
    assert "Tested by: the change of the loss, of 8 documents." in text
    assert text.endswith("Kernels untouched.")


@pytest.mark.parametrize(
    ("outcome", "reference", "said"),
    [
        ("", "BertModel built anew.", "Nothing was tested by intervention (--verify)."),
        ("the change of the loss", "no reference: none was asked for.", "No reference: none was asked for."),
    ],
)
def test_what_was_not_done_is_said(outcome, reference, said):
    html = Report(rows=Table(), diagnosis=Diagnosis(outcome=outcome, reference=reference)).to_html()
    assert said in html
    assert "Compared with: no reference" not in html


def test_what_was_clear_and_what_was_not_checked_stand_below_the_layers(page):
    text = page.one("#overview").text
    clear, unchecked = text.index("Checked and clear"), text.index("Not checked")
    assert page.one(".headline").location["y"] < page.one(".checked").location["y"]
    assert clear < text.index("all pairs of tokens differ in float32") < unchecked
    assert unchecked < text.index("needs what heads write through W_O")


def test_the_layers_stand_beside_their_initialisation_with_the_kinds_of_their_heads(page):
    heads = [one.text.split("\n")[0] for one in page.all(".headline")[0].find_elements(By.CSS_SELECTOR, "thead th")]
    assert (heads.count("× init"), heads[-1]) == (2, "heads")
    for layer, row in enumerate(page.all(".headline")[0].find_elements(By.CSS_SELECTOR, "tbody tr")):
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        assert cells[1] == "2.00×"
        assert cells[-1] == ("1p 3m" if layer else "")
    assert "p points each query to keys of its own" in page.one("#overview").text


def test_without_verdicts_a_card_says_that_it_is_clear(browser, tmp_path):
    made = replace(report(layers=2, heads=2, tokens=8), diagnosis=Diagnosis())
    page = Page(browser, made.save_html(tmp_path / "clear.html"))
    (card,) = page.all(".card")
    assert card.get_attribute("class") == "card clear"
    assert "Nothing that was looked for was found." in card.text
    assert page.errors() == []


def test_without_a_diagnosis_there_are_no_cards(browser, tmp_path):
    page = Page(browser, report(layers=2, heads=2, tokens=8).save_html(tmp_path / "none.html"))
    assert page.all(".card, .strip, .checked") == []


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(browser, saved, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, saved)
        browser.refresh()
        for name in ("depth", "heads"):
            drawn(page, name)
            box = page.one(f"#opening-{name}-0").rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        for summary in page.all(".card summary"):
            summary.click()  # tables of numbers scroll within their card
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.body.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.errors() == []


@pytest.mark.parametrize("name", BREAKOUTS)
def test_names_in_a_diagnosis_are_text(browser, tmp_path, name):
    one = verdict(
        name,
        Severity.FAIL,
        stack=name,
        claim=name,
        comparisons=(Comparison(name, name, 1.0),),
        refuted_by=name,
        command=name,
    )
    told = diagnosis(
        verdicts=(one,),
        clear=(Checked(name, name),),
        unchecked=(Checked(name, name),),
        because=name,
        reference=name,
        outcome=name,
        kinds=((name, 1, 0, "pointer"),),
    )
    page = Page(
        browser, replace(diagnosed(layers=2, heads=2, stack=name), diagnosis=told).save_html(tmp_path / "p.html")
    )
    drawn(page, "heads")
    seen = " ".join(name.split())
    assert seen in " ".join(page.one(".card").text.split())
    assert seen in " ".join(page.one(".strip").text.split())
    assert page.all("body img, body main script") == []
    assert len(page.all("script")) == 3
    assert page.errors() == []


def test_a_series_has_the_cards_of_each_variant_in_its_fold(browser, made, tmp_path):
    series = Variants.of([made, replace(made, diagnosis=Diagnosis())], ["before", "after"])
    page = Page(browser, series.save_html(tmp_path / "series.html"))
    folds = page.all("details.variant")
    assert [len(fold.find_elements(By.CSS_SELECTOR, ".card")) for fold in folds] == [3, 1]
    folds[1].find_element(By.TAG_NAME, "summary").click()
    page.until(lambda: page.all("#opening-depth-1 .main-svg"))
    assert page.errors() == []
