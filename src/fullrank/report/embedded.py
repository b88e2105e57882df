"""What the page's scripts draw from, as one JSON text that is safe inside a script element."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fullrank.report.context import context_figures
from fullrank.report.glossary import term
from fullrank.report.heads import heads
from fullrank.report.profile import profile
from fullrank.report.scree import sketch
from fullrank.report.series import Series
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.style import TEMPLATE
from fullrank.report.wording import number, scope_words
from fullrank.table import COLUMNS, context_of, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["chooser", "embedded", "script_safe"]

_FIRST_PROFILES = ("token_energy", "similarity", "centered_stable_rank", "residual")
_MOST_MAPS = 3
_FIRST_BY_CONTEXT = ("normalized_entropy", "similarity", "token_energy")
_FIRST_MAPS = ("normalized_entropy", "sink_mass", "attention_s2")


def embedded(
    reports: Sequence[Report], labels: Sequence[str], series: Sequence[Series], *, of: str = "report"
) -> dict[str, Any]:
    """Figures, rows and definitions: everything that the page shows on demand.

    Args:
        reports: what is shown together.
        labels: one name each.
        series: their rows, as they are drawn.
        of: what a label names, `report` or `variant`: the column of the table that holds it.

    Returns:
        What the page's scripts read.
    """
    metrics = dict.fromkeys(row.metric for one in series for row in one.rows)
    return {
        "template": TEMPLATE,
        "profiles": _profiles(series),
        # of many reports the first and the last are compared head by head: more maps than three have no room
        "maps": _maps(series if len(series) <= _MOST_MAPS else (series[0], series[-1])),
        "spectra": _spectra(series),
        "contexts": _contexts(series),
        "table": _table(reports, labels, of),
        "scopes": {row.scope: scope_words(row.scope) for one in series for row in one.rows},
        "terms": {metric: _term(metric) for metric in metrics},
    }


def script_safe(content: Any) -> str:
    """JSON that cannot end or escape the script element it stands in, whatever the names in it.

    `<`, `>`, `&` and the two line separators that JavaScript and JSON disagree on are written as escapes; in JSON they
    can only stand in strings, where the escape means the same.

    Returns:
        The text.
    """
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _contexts(series: Sequence[Series]) -> dict[str, Any] | None:
    figures = context_figures(series)
    return chooser(figures, _FIRST_BY_CONTEXT) if figures else None


def _profiles(series: Sequence[Series]) -> dict[str, Any]:
    keys = dict.fromkeys(
        (row.metric, row.stack, row.scope)
        for one in series
        for row in one.rows
        if row.head is None and context_of(row.scope) is None
    )
    figures = [
        {"metric": metric, "place": stack, "scope": scope, "figure": profile(series, metric, scope=scope, stack=stack)}
        for metric, stack, scope in keys
    ]
    return chooser(figures, _FIRST_PROFILES)


def _maps(series: Sequence[Series]) -> dict[str, Any]:
    keys = dict.fromkeys(
        (row.metric, row.stack, row.site, row.part, row.scope)
        for one in series
        for row in one.rows
        if row.head is not None and context_of(row.scope) is None
    )
    figures = [
        {
            "metric": metric,
            "place": f"{stack} · {part}",
            "scope": scope,
            "figure": heads(series, metric, scope=scope, stack=stack, site=site, part=part),
        }
        for metric, stack, site, part, scope in keys
    ]
    return chooser(figures, _FIRST_MAPS)


def chooser(figures: list[dict[str, Any]], preferred: Sequence[str]) -> dict[str, Any]:
    """Figures of which a metric, a place and a scope choose one.

    Args:
        figures: each with its `metric`, `place` and `scope`.
        preferred: metrics; the first of them that is there is shown first.

    Returns:
        `figures`, the metric that is `first`, and the `headline` scope of every metric.
    """
    metrics = {figure["metric"] for figure in figures}
    first = next((metric for metric in preferred if metric in metrics), figures[0]["metric"] if figures else None)
    scopes: dict[str, set[str]] = {}
    for figure in figures:
        scopes.setdefault(figure["metric"], set()).add(figure["scope"])
    return {
        "figures": figures,
        "first": first,
        "headline": {metric: headline(found) for metric, found in scopes.items()},
    }


def _spectra(series: Sequence[Series]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int, str, int], list[tuple[Series, HeadSpectrum]]] = {}
    for one in series:
        for spectrum in one.spectra:
            groups.setdefault(spectrum.key, []).append((one, spectrum))
    return [
        {"place": f"{stack} · {part}", "layer": layer, "head": head, "figure": _rounded(sketch(found))}
        for (stack, layer, part, head), found in groups.items()
    ]


def _rounded(value: Any) -> Any:
    """Five digits are more than a screen shows; the exact values are in the JSON report."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _table(reports: Sequence[Report], labels: Sequence[str], of: str) -> dict[str, Any]:
    """Columns of all rows; texts as indices into their distinct values, numbers with what is shown of them."""
    rows = [(label, row) for report, label in zip(reports, labels, strict=True) for row in report.rows]
    names = [*((of,) if len(reports) > 1 else ()), *COLUMNS, "note"]
    columns = []
    for name in names:
        values: list[Any] = [label if name == of else getattr(row, name) for label, row in rows]
        if name in ("layer", "head", "n"):
            columns.append({"name": name, "values": values})
        elif name in ("value", "stderr"):
            exact = [str(v) if v is not None and math.isinf(v) else v for v in values]
            columns.append({"name": name, "values": exact, "shown": [number(v) for v in values]})
        else:
            texts = [("yes" if value else "no") if isinstance(value, bool) else value for value in values]
            index = {text: position for position, text in enumerate(dict.fromkeys(texts))}
            columns.append({"name": name, "distinct": list(index), "codes": [index[text] for text in texts]})
    return {"rows": len(rows), "columns": columns}


def _term(metric: str) -> dict[str, str]:
    words = term(metric)
    facts = {
        "definition": words.definition,
        "unit": words.unit,
        "range": words.range,
        "healthy": words.healthy,
        "collapsed": words.collapsed,
        "null": words.null,
        "source": words.source,
    }
    return {name: text for name, text in facts.items() if text}
