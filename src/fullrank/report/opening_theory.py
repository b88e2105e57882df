"""What the page of a prediction opens with: what its theories say over depth, dotted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    panels,
)
from fullrank.report.wording import number
from fullrank.table import Row, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["dotted", "theories_figure"]


def theories_figure(report: Report, metric: str, title: str) -> Spec | None:
    """A metric of the stream by every theory that gives it, one panel per stack.

    Args:
        report: predicted.
        metric: with values in [0, 1], such as `similarity`.
        title: of the axis.

    Returns:
        The figure; None where no theory gives the metric.
    """
    lines = dotted(report, metric)
    if not lines:
        return None
    domains = panels(len(lines))
    data: list[Spec] = []
    layout: Spec = {"height": 330, "annotations": [], "showlegend": True, "margin": {"t": 44, "b": 44}}
    layout["height"] += 20 * ((max(map(len, lines.values())) - 1) // 3)  # a legend of several lines takes its room
    for panel, (stack, traces) in enumerate(lines.items()):
        axes = {"xaxis": axis_name("x", panel), "yaxis": axis_name("y", panel)}
        names = {"showlegend": panel == 0}
        data += [one | axes | names | {"name": one["name"].removeprefix("theory:")} for one in traces]
        layers = [layer for one in traces for layer in one["x"]]
        layout[axis_key("x", panel)] = layer_axis(layers) | {
            "domain": list(domains[panel]),
            "anchor": axis_name("y", panel),
        }
        low = min((value for one in traces for value in one["y"] if value is not None), default=0.0)
        layout[axis_key("y", panel)] = {"range": [min(0.0, 1.03 * low), 1.03], "anchor": axis_name("x", panel)}
        if len(lines) > 1:
            layout["annotations"].append(caption(stack, domains[panel][0]))
    layout["yaxis"] |= {"title": {"text": title}}
    return {"data": data, "layout": layout}


def dotted(report: Report, metric: str) -> dict[str, list[Spec]]:
    """By stack: a dotted line of every theory that gives a metric of the stream, as its standing has it.

    Args:
        report: predicted.
        metric: of the stream.

    Returns:
        Traces, in the colours that the page's other figures give the same theories beside one measurement.
    """
    keys = [] if report.prediction is None else [one.key for one in report.prediction.standings]
    found: dict[str, list[Spec]] = {}
    for index, key in enumerate(keys):
        place = (f"theory:{key}", metric, "stream", "out", None)
        rows = [row for row in report.rows if (row.source, row.metric, row.site, row.part, row.head) == place]
        colour = COLOURS[1 + index] if 1 + index < len(COLOURS) else MUTED
        for stack in dict.fromkeys(row.stack for row in rows):
            of_stack = [row for row in rows if row.stack == stack]
            scope = headline({row.scope for row in of_stack})
            chosen = sorted((row for row in of_stack if row.scope == scope), key=lambda row: row.layer)
            found.setdefault(stack, []).append(_line(chosen, key, colour, primary=index == 0))
    return found


def _line(rows: Sequence[Row], key: str, colour: str, *, primary: bool) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escaped(f"theory:{key}"),
        "x": [row.layer for row in rows],
        "y": [drawable(row.value) for row in rows],
        "customdata": [[number(row.value), number(row.stderr)] for row in rows],
        "error_y": {
            "type": "data",
            "array": [drawable(row.stderr) for row in rows],
            "thickness": 1,
            "width": 0,
            "visible": any(row.stderr for row in rows),
        },
        "line": {"color": colour, "width": 2.4 if primary else 1.4, "dash": "dot"},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": f"<b>layer %{{x}}</b>: %{{customdata[0]}} ± %{{customdata[1]}}<extra>{escaped(key)}</extra>",
    }
