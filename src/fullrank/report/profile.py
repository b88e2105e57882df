"""A metric of the stream over depth: one panel per stack, one line per place, error bars and the null's value."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fullrank.errors import TableError
from fullrank.report.glossary import term
from fullrank.report.means import over_heads
from fullrank.report.places import place_of, place_words
from fullrank.report.series import Series, select, series_colour
from fullrank.report.style import (
    COLOURS,
    MUTED,
    Spec,
    axis_key,
    axis_name,
    caption,
    drawable,
    escaped,
    layer_axis,
    meaning,
    panels,
    wrapped,
)
from fullrank.report.wording import at_floor, evidence, number
from fullrank.table import Row

__all__ = ["profile"]

_MARKS = {"out": ("circle", "solid"), "mid": ("circle-open", "dot"), "read": ("square-open", "dash")}
_OTHER = (("diamond", "solid"), ("cross", "dash"), ("triangle-up", "dot"), ("x", "dashdot"), ("star", "longdash"))


def profile(
    series: Sequence[Series],
    metric: str,
    *,
    scope: str | None = None,
    stack: str | None = None,
    site: str | None = None,
    part: str | None = None,
    source: str | None = None,
    logarithmic: bool = False,
) -> Spec:
    """Value against layer. `mid` stands half a layer before its block's output, where it is in the model.

    Several series are told apart by colour, places by mark and dash; of one series the places have colours too. Of
    several, only block outputs are shown at first; a click on its name in the legend adds another place. What a theory
    says is dotted.

    Returns:
        The figure.

    Raises:
        TableError: where no series has the metric at that place.
    """
    words = term(metric)
    whole = any(row.head is None and row.metric == metric for one in series for row in one.rows)
    found = {one.label: _chosen(one, metric, scope, stack, site, part, source, whole=whole) for one in series}
    everything = [row for rows in found.values() for row in rows]
    if not everything:  # says what there is instead
        rows = [row for one in series for row in one.rows if row.head is None]
        select(rows, metric, scope=scope, stack=stack, site=site, part=part, source=source)
    stacks = list(dict.fromkeys(row.stack for row in everything))
    places = sorted(dict.fromkeys(map(place_of, everything)), key=_order)
    domains = panels(len(stacks))
    crowded = sum(not one.predicted for one in series) > len(COLOURS)
    data: list[Spec] = []
    layout: Spec = {"annotations": [], "shapes": [], "height": 420, "showlegend": len(series) * len(places) > 1}
    for panel, name in enumerate(stacks):
        layers = sorted({row.layer for row in everything if row.stack == name})
        layout[axis_key("x", panel)] = layer_axis(layers) | {
            "domain": list(domains[panel]),
            "anchor": axis_name("y", panel),
            "range": [layers[0] - 0.6, layers[-1] + 0.6],
        }
        layout[axis_key("y", panel)] = {
            "anchor": axis_name("x", panel),
            "type": "log" if logarithmic else "linear",
            **({"title": {"text": escaped(_title(words.title, everything))}} if panel == 0 else {"matches": "y"}),
        }
        if len(stacks) > 1:
            layout["annotations"].append(
                caption(_title(name, [r for r in everything if r.stack == name]), domains[panel][0])
            )
        for index, one in enumerate(series):
            for position, place in enumerate(places):
                rows = [row for row in found[one.label] if row.stack == name and place_of(row) == place]
                if not rows:
                    continue
                if crowded and place != ("stream", "out") and ("stream", "out") in places:
                    continue  # a legend of so many lines could not be read
                colour = series_colour(series, index) if len(series) > 1 else COLOURS[position % len(COLOURS)]
                trace = _trace(rows, place, position, one, colour, meaning(words))
                trace |= {"xaxis": axis_name("x", panel), "yaxis": axis_name("y", panel)}
                if len(series) > 1 and place != ("stream", "out") and ("stream", "out") in places:
                    trace["visible"] = "legendonly"  # a click on its name shows it
                data.append(trace | {"showlegend": panel == 0})
        _draw_null(layout, [one.null(name, metric) for one in series], panel, logarithmic)
    layout["meta"] = {"missing": _missing(everything, labelled=len(series) > 1)}
    return {"data": data, "layout": layout}


def _chosen(
    one: Series,
    metric: str,
    scope: str | None,
    stack: str | None,
    site: str | None,
    part: str | None,
    source: str | None,
    *,
    whole: bool,
) -> list[Row]:
    of_metric = [row for row in one.rows if row.metric == metric]
    rows = [row for row in of_metric if row.head is None]
    if whole and not rows:  # what heads have here stands beside what another series says of their mean
        rows = over_heads(of_metric)
    if not rows:
        return []
    try:
        return select(rows, metric, scope=scope, stack=stack, site=site, part=part, source=source)
    except TableError:  # the other series may have it
        return []


def _trace(rows: list[Row], place: tuple[str, str], position: int, one: Series, colour: str, words: str) -> Spec:
    site, part = place
    label = one.label
    rows = sorted(rows, key=lambda row: row.layer)
    middle = part == "mid" and site in ("stream", "read", "gradient")
    kind = site if site == "read" else part
    symbol, dash = _MARKS.get(kind) or _OTHER[position % len(_OTHER)]
    if one.predicted:
        dash = "dot"
    name = " · ".join(words for words in (label, place_words(site, part)) if words)
    spread = [drawable(row.stderr) for row in rows]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escaped(name),
        "x": [row.layer - 0.5 if middle else row.layer for row in rows],
        "y": [drawable(row.value) for row in rows],
        "customdata": [
            [row.layer, number(row.value), wrapped(evidence(row)), escaped(_title(place_words(site, part), [row]))]
            for row in rows
        ],
        "error_y": {"type": "data", "array": spread, "thickness": 1, "width": 0, "visible": any(spread)},
        "line": {"color": colour, "width": 2 if kind == "out" else 1.2, "dash": dash},
        "marker": {
            "color": colour,
            "size": 5 if one.predicted else 7,
            "symbol": ["triangle-down" if at_floor(row) else symbol for row in rows],
        },
        "hovertemplate": f"<b>layer %{{customdata[0]}}</b> %{{customdata[3]}}: <b>%{{customdata[1]}}</b>"
        f"<br>%{{customdata[2]}}<br><span style='color:{MUTED}'>{words}</span><extra>{escaped(label)}</extra>",
    }


def _title(words: str, rows: list[Row]) -> str:
    """The words with the scope, where all rows share one that is not the plain one."""
    scopes = {row.scope for row in rows}
    return f"{words}, {scopes.pop()}" if len(scopes) == 1 and "all" not in scopes else words


def _order(place: tuple[str, str]) -> int:
    known = (("stream", "out"), ("stream", "mid"), ("read", "out"), ("read", "mid"))
    return known.index(place) if place in known else len(known)


def _draw_null(layout: Spec, values: list[float | None], panel: int, logarithmic: bool) -> None:
    known = sorted({value for value in values if value is not None and (value > 0 or not logarithmic)})
    if not known:
        return
    value = known[0]
    x, y = axis_name("x", panel), axis_name("y", panel)
    line = {"color": MUTED, "width": 1, "dash": "dash"}
    place = {"xref": f"{x} domain", "yref": y}
    layout["shapes"].append({"type": "line", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line} | place)
    if logarithmic:
        value = math.log10(value)  # annotations, unlike shapes, are placed in the axis' own exponents
    said = f"random tokens: {number(known[0])}"
    layout["annotations"].append(
        {
            "text": said,
            "x": 1,
            "y": value,
            "xanchor": "right",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": MUTED},
        }
        | place
    )


def _missing(rows: list[Row], *, labelled: bool) -> list[str]:
    absent: dict[str, list[int]] = {}
    for row in rows:
        if drawable(row.value) is None:
            reason = row.note or number(row.value)
            key = f"{place_words(row.site, row.part)}: {reason}" + (f" ({row.source})" if labelled else "")
            absent.setdefault(key, []).append(row.layer)
    return [f"layer {', '.join(map(str, sorted(set(layers))))} · {key}" for key, layers in absent.items()]
