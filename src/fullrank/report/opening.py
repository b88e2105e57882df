"""What the page opens with: the shares of the stream over depth beside the initialisation's, and the map of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fullrank.report.opening_theory import dotted, theories_figure
from fullrank.report.style import (
    ACCENT,
    COLOURS,
    MUTED,
    Spec,
    axis_key,
    axis_name,
    caption,
    drawable,
    escaped,
    layer_axis,
    panels,
    shade,
)
from fullrank.report.wording import number
from fullrank.table import Row, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["depth_figure", "head_map", "opening"]

_SHARE = "share particular to a token"
_GREY = "rgba(120, 124, 128, 0.34)"
_MARKS = {"pointer": "triangle-up", "mixer": "circle", "average": "square", "sink": "x"}
_CORNERS = (  # where entropy and selectivity are both high or low, of the plot's width and height
    ("average", 0.01, 0.99, "left", "top"),
    ("mixer", 0.99, 0.99, "right", "top"),
    ("frozen, or at rest", 0.01, 0.01, "left", "bottom"),
    ("pointer", 0.99, 0.01, "right", "bottom"),
)


def opening(report: Report, among: Sequence[Report] = ()) -> dict[str, Any] | None:
    """Both figures of a report; None where it has not the numbers for either.

    Args:
        report: measured, or predicted: then its figures are of theories.
        among: what it is shown with; what is predicted there is drawn into a measured report's first figure.

    Returns:
        `depth`, and `heads` or `theories`.
    """
    if report.prediction is not None:
        depth = theories_figure(report, "token_energy", _SHARE)
        theories = theories_figure(report, "similarity", "similarity")
        return {"depth": depth, "theories": theories} if depth or theories else None
    depth, heads = depth_figure(report, [one for one in among if one.prediction is not None]), head_map(report)
    return {"depth": depth, "heads": heads} if depth or heads else None


def depth_figure(report: Report, predicted: Sequence[Report] = ()) -> Spec | None:
    """The share of the stream's energy that is particular to a token, over depth, one panel per stack.

    The ribbon is the same of the same architecture at its own initialisation, two standard errors wide on each side;
    dotted is what theories say.

    Args:
        report: with or without a reference.
        predicted: reports of theories.

    Returns:
        The figure; None where the report has no such numbers.
    """
    found = _courses(report.rows)
    expected = _courses(report.reference.rows) if report.reference is not None else {}
    if not found:
        return None
    domains = panels(len(found))
    data: list[Spec] = []
    layout: Spec = {"height": 330, "annotations": [], "showlegend": True, "margin": {"t": 44, "b": 44}}
    for panel, (stack, rows) in enumerate(found.items()):
        axes = {"xaxis": axis_name("x", panel), "yaxis": axis_name("y", panel)}
        if stack in expected:
            data += [one | axes for one in _ribbon(expected[stack], first=panel == 0)]
        data.append(_line(rows, first=panel == 0) | axes)
        for one in predicted:
            data += [line | axes | {"showlegend": panel == 0} for line in dotted(one, "token_energy").get(stack, [])]
        layers = [row.layer for row in rows]
        layout[axis_key("x", panel)] = layer_axis(layers) | {
            "domain": list(domains[panel]),
            "anchor": axis_name("y", panel),
        }
        layout[axis_key("y", panel)] = {"range": [0, 1.03], "anchor": axis_name("x", panel)}
        if len(found) > 1:
            layout["annotations"].append(caption(stack, domains[panel][0]))
    layout["yaxis"] |= {"title": {"text": _SHARE}}
    if len(found) > 1:  # room for the panels' titles below the legend
        layout["margin"]["t"] = 64
        layout["legend"] = {"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom", "font": {"size": 12}}
    return {"data": data, "layout": layout}


def head_map(report: Report) -> Spec | None:
    """Every head by its entropy and its selectivity, marked by its kind, dark for deep layers.

    Args:
        report: with or without a diagnosis, which says the kinds.

    Returns:
        The figure; None where the report has no heads.
    """
    entropy, selectivity = (_of_heads(report.rows, name) for name in ("normalized_entropy", "selectivity"))
    heads = [key for key in entropy if key in selectivity]
    if not heads:
        return None
    kinds = {(s, n, h): kind for s, n, h, kind in (report.diagnosis.kinds if report.diagnosis else ())}
    stacks = list(dict.fromkeys(stack for stack, _, _ in heads))
    layers = sorted({layer for _, layer, _ in heads})
    data = []
    for kind in [*_MARKS, ""]:
        chosen = [key for key in heads if kinds.get(key, "") == kind]
        if not chosen:
            continue
        where = [f"{stack} " if len(stacks) > 1 else "" for stack, _, _ in chosen]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind or "head",
                "x": [drawable(selectivity[key].value) for key in chosen],
                "y": [drawable(entropy[key].value) for key in chosen],
                "customdata": [
                    [
                        f"{escaped(name)}layer {key[1]}, head {key[2]}",
                        number(selectivity[key].value),
                        number(entropy[key].value),
                    ]
                    for name, key in zip(where, chosen, strict=True)
                ],
                "marker": {
                    "symbol": _MARKS.get(kind, "circle"),
                    "size": 9,
                    "color": [shade(key[1], layers) for key in chosen],
                    "line": {"color": "#ffffff", "width": 0.7},
                },
                "hovertemplate": "<b>%{customdata[0]}</b><br>normalized_entropy %{customdata[2]}, selectivity "
                f"%{{customdata[1]}} nats<extra>{kind}</extra>",
            }
        )
    # heads that all average must not be drawn apart by less than a nat
    widest = max(1.0, *(selectivity[key].value or 0.0 for key in heads))
    corners = [
        {
            "text": text,
            "x": x,
            "y": y,
            "xref": "x domain",
            "yref": "y domain",
            "xanchor": across,
            "yanchor": up,
            "showarrow": False,
            "font": {"size": 11, "color": MUTED},
        }
        for text, x, y, across, up in _CORNERS
    ]
    layout: Spec = {
        "height": 330,
        "margin": {"t": 44, "b": 44},
        "showlegend": len(data) > 1,
        "annotations": corners,
        "xaxis": {"title": {"text": "selectivity (nats)"}, "range": [-0.03 * widest, 1.05 * widest]},
        "yaxis": {"title": {"text": "normalised entropy"}, "range": [-0.09, 1.13]},
    }
    return {"data": data, "layout": layout}


def _courses(rows: Sequence[Row] | Any) -> dict[str, list[Row]]:
    """By stack: `token_energy` after each layer; of one sequence there is none, and 1 minus similarity is no share."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        place = (row.metric, row.site, row.part, row.head)
        if place == ("token_energy", "stream", "out", None) and row.value is not None:
            found.setdefault(row.stack, {}).setdefault(row.scope, []).append(row)
    return {stack: sorted(scopes[headline(scopes)], key=lambda row: row.layer) for stack, scopes in found.items()}


def _of_heads(rows: Any, metric: str) -> dict[tuple[str, int, int], Row]:
    """By stack, layer and head: the number of the block's first attention at its headline scope."""
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        if row.metric == metric and row.head is not None and row.part == "self" and row.value is not None:
            found.setdefault((row.stack, row.layer, row.head), {})[row.scope] = row
    return {key: scopes[headline(scopes)] for key, scopes in found.items()}


def _ribbon(rows: list[Row], *, first: bool) -> list[Spec]:
    x = [row.layer for row in rows]
    low, high = (
        [drawable((row.value or 0.0) + sign * max(2 * (row.stderr or 0.0), 0.01)) for row in rows] for sign in (-1, 1)
    )
    plain = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        plain | {"y": low, "showlegend": False},
        plain
        | {"y": high, "fill": "tonexty", "fillcolor": _GREY, "name": "at its own initialisation", "showlegend": first},
    ]


def _line(rows: list[Row], *, first: bool) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "this model",
        "showlegend": first,
        "x": [row.layer for row in rows],
        "y": [drawable(row.value) for row in rows],
        "customdata": [[number(row.value), number(row.stderr)] for row in rows],
        "error_y": {"type": "data", "array": [drawable(row.stderr) for row in rows], "thickness": 1, "width": 0},
        "line": {"color": COLOURS[0], "width": 2},
        "marker": {"color": [ACCENT if "float floor" in row.note else COLOURS[0] for row in rows], "size": 7},
        "hovertemplate": "<b>layer %{x}</b>: %{customdata[0]} ± %{customdata[1]}<extra></extra>",
    }
