"""What a notebook shows: small, styled inline, without a script."""

from html.parser import HTMLParser

from report.synthetic import report


def test_the_notebook_summary_is_small_and_has_no_script():
    html = report()._repr_html_()
    assert len(html) < 60_000
    assert "<script" not in html
    assert "<svg" in html


def test_the_notebook_summary_has_a_line_per_layer_with_the_numbers_of_the_table():
    made = report(layers=3, heads=2, tokens=8)

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts = []

        def handle_data(self, data):
            self.texts.append(data.strip())

    cells = Cells()
    cells.feed(made._repr_html_())
    for layer in range(4):
        assert f"{made.pivot('token_energy', site='stream').loc[layer, 'out']:.3f}" in cells.texts


def test_names_are_text_in_a_notebook():
    assert "<script" not in report(layers=1, heads=1, tokens=4, model="<script>alert(1)</script>")._repr_html_()


def test_an_overlay_shows_both_in_a_notebook():
    made = report(layers=1, heads=1, tokens=4)
    html = made.overlay(made, labels=("before", "after"))._repr_html_()
    assert html.index("before") < html.index("after")
