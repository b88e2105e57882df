"""The report as one self-contained page, and as a short piece of HTML for a notebook."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from fullrank.report.agreement import of_overlaid
from fullrank.report.courses import courses
from fullrank.report.embedded import embedded, script_safe
from fullrank.report.glossary import term
from fullrank.report.headlines_predicted import tables_of
from fullrank.report.opening import opening
from fullrank.report.remarks import remarks
from fullrank.report.series import series_of
from fullrank.report.terminal_diagnosis import KINDS, beside, compared, effect_words, named_once, weights_look
from fullrank.report.terminal_prediction import answer_facts, answer_words
from fullrank.report.trends import counted, steepest
from fullrank.report.wording import examined, kernel_words, model_title, number, row_notes, scope_words

if TYPE_CHECKING:
    from markupsafe import Markup

    from fullrank.report.report import Report
    from fullrank.report.trainability_map import TrainabilityMap
    from fullrank.report.variants import Variants

__all__ = ["map_page", "page", "rendered", "summary", "text_of_template"]


def page(reports: Sequence[Report], labels: Sequence[str], *, variants: Variants | None = None) -> str:
    """One HTML document: styles, scripts and data inside, nothing asked of the network.

    Of variants the page opens with what changed, and has a section of every metric against them.

    A content security policy forbids every request, so that this holds whatever the drawing library would do.

    Returns:
        The document.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    series = series_of(reports, labels)
    data = embedded(reports, labels, series, of="report" if variants is None else "variant")
    data["series"] = None if variants is None else courses(variants)
    data["openings"] = [opening(report, reports) for report in reports]
    return rendered(
        "page.html",
        title=_title(reports, labels, variants),
        variants=variants,
        reports=_overviews(reports, labels),
        scope_words=scope_words,
        number=number,
        effect_words=effect_words,
        answer_facts=answer_facts,
        foretold_only=all(report.prediction is not None for report in reports),
        weights_look=weights_look,
        named_once=named_once,
        compared=compared,
        kinds_of_heads=KINDS,
        terms=[term(metric) for metric in data["terms"]],
        data=data,
        css=Markup(text_of_template("page.css")),
        script=Markup("\n".join(map(text_of_template, ("figures.js", "sheet.js", "definitions.js", "tabs.js")))),
        plotly=Markup(get_plotlyjs()),
        json=Markup(script_safe(data)),
    )


def map_page(of: TrainabilityMap) -> str:
    """One HTML document of a map: the architecture, what the map says, the figure and what its phases mean.

    Returns:
        The document.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from fullrank.report.trainability_map import MEANINGS

    return rendered(
        "map.html",
        title=f"What trains: {' and '.join(axis.name for axis in of.axes)}",
        map=of,
        phases=[(name, MEANINGS[name]) for name, share in of.shares().items() if share],
        css=Markup(text_of_template("page.css")),
        plotly=Markup(get_plotlyjs()),
        json=Markup(script_safe(json.loads(of.figure().to_json()))),
    )


def _title(reports: Sequence[Report], labels: Sequence[str], variants: Variants | None) -> str:
    if variants is not None:
        return f"{len(variants)} variants: {labels[0]}" + (f" to {labels[-1]}" if len(labels) > 1 else "")
    return " and ".join(label or model_title(report.about) for report, label in _pairs(reports, labels))


def summary(reports: Sequence[Report], labels: Sequence[str]) -> str:
    """What a notebook shows: what was examined and the headline table, styled inline and without a script."""
    words = {"effect_words": effect_words, "answer_words": answer_words, "number": number}
    return rendered("notebook.html", reports=_overviews(reports, labels), **words)


def _overviews(reports: Sequence[Report], labels: Sequence[str]) -> list[dict[str, Any]]:
    overviews = []
    for report, label in _pairs(reports, labels):
        tables = [(label, beside(table, report)) for label, table in tables_of(report)]
        overviews.append(
            {
                "label": label,
                "model": model_title(report.about),
                "facts": examined(report.about),
                "kernels": kernel_words(report.about),
                "notes": [*map(str, report.about.get("notes") or []), *remarks(report.rows)],
                "row_notes": row_notes(report.rows),
                "tables": tables,
                "diagnosis": report.diagnosis,
                "prediction": report.prediction,
                "agreement": "" if report.prediction is None else of_overlaid(reports),
                "opening": opening(report) is not None,
                "rows": len(report.rows),
                "trends": steepest(report.context_slopes, report.rows),
                "counted": counted(report.context_slopes),
            }
        )
    return overviews


def _pairs(reports: Sequence[Report], labels: Sequence[str]) -> list[tuple[Report, str]]:
    return list(zip(reports, labels, strict=True))


def text_of_template(name: str) -> str:
    """A file of the templates, as it is."""
    return resources.files("fullrank.report").joinpath("templates", name).read_text(encoding="utf-8")


def rendered(name: str, **content: Any) -> str:
    """A template with its content; text in it is escaped, and a name that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fullrank.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"breakable": _breakable, "beginning": lambda words: words[:1].upper() + words[1:]}
    return environment.get_template(name).render(**content)


def _breakable(name: str) -> Markup:
    """A name that may be broken where a SPEC has its signs, rather than within a word."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[?&,=])", name))  # what is joined is escaped
