"""Pictures of a trainability map: a plane coloured by phase, or the similarity along one field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fullrank.report.style import COLOURS, INK, Spec, escaped
from fullrank.report.wording import number

if TYPE_CHECKING:
    from fullrank.report.trainability_map import Axis, TrainabilityMap

__all__ = ["drawn"]

_SHADES = ("#e3efe8", "#f3d9c4", "#d9d3ea", "#dcdcdc")
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of similarity, lines on the plane


def drawn(of: TrainabilityMap) -> Spec:
    """Of two fields a plane coloured by phase, lines of equal similarity on it; of one the similarity along it.

    Args:
        of: which map.

    Returns:
        The figure as Plotly's JSON.
    """
    return _plane(of) if len(of.axes) == 2 else _line(of)


def _plane(of: TrainabilityMap) -> Spec:
    across, up = of.axes
    x, y = across.values.tolist(), up.values.tolist()
    last = len(of.phases) - 1
    rhos = [[number(rho) for rho in line] for line in of.similarity.T.tolist()]
    data: list[Spec] = [
        {
            "type": "heatmap",
            "x": x,
            "y": y,
            "z": of.phase.T.tolist(),
            "zmin": -0.5,
            "zmax": last + 0.5,
            "colorscale": [[(at + edge) / (last + 1), _SHADES[at]] for at in range(last + 1) for edge in (0, 1)],
            "showscale": False,
            "customdata": [
                [[of.phases[index], rho] for index, rho in zip(line, row, strict=True)]
                for line, row in zip(of.phase.T.tolist(), rhos, strict=True)
            ],
            "hovertemplate": f"<b>%{{customdata[0]}}</b><br>{escaped(across.name)} %{{x:.3g}}, {escaped(up.name)} "
            "%{y:.3g}<br>similarity %{customdata[1]}<extra></extra>",
        }
    ]
    if any(of.similarity.min() < level < of.similarity.max() for level in _LEVELS):
        data.append(
            {
                "type": "contour",
                "x": x,
                "y": y,
                "z": of.similarity.T.tolist(),
                "contours": {
                    "coloring": "none",
                    "showlabels": True,
                    "start": _LEVELS[0],
                    "end": _LEVELS[-1],
                    "size": 0.2,
                },
                "line": {"color": INK, "width": 1},
                "showscale": False,
                "showlegend": True,
                "hoverinfo": "skip",
                "name": "similarity after the last block",
            }
        )
    data += _legend(of)
    if of.here is not None and across.own is not None and up.own is not None:
        data.append(_mark(across.own, up.own))
    return {"data": data, "layout": {"height": 560, "xaxis": _axis(across), "yaxis": _axis(up), "showlegend": True}}


def _line(of: TrainabilityMap) -> Spec:
    (axis,) = of.axes
    data: list[Spec] = [
        {
            "type": "scatter",
            "x": axis.values.tolist(),
            "y": of.similarity.tolist(),
            "mode": "lines+markers",
            "name": "similarity after the last block",
            "line": {"color": COLOURS[0], "dash": "dot"},
            "marker": {"size": 4},
            "text": [of.phases[index] for index in of.phase],
            "hovertemplate": f"<b>%{{text}}</b><br>{escaped(axis.name)} %{{x:.3g}}: %{{y:.3f}}<extra></extra>",
        }
    ]
    shapes = [
        {"type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1, "layer": "below"}
        | {"fillcolor": _SHADES[index], "line": {"width": 0}}
        for index, first, last in _stretches(of)
    ]
    data += _legend(of)
    place = axis.nearest()
    if axis.own is not None and place is not None:
        data.append(_mark(axis.own, float(of.similarity[place])))
    low = min(-0.02, 1.03 * float(of.similarity.min()))
    layout: Spec = {"height": 420, "xaxis": _axis(axis), "showlegend": True, "shapes": shapes}
    return {"data": data, "layout": layout | {"yaxis": {"title": {"text": "similarity"}, "range": [low, 1.02]}}}


def _stretches(of: TrainabilityMap) -> Iterator[tuple[int, float, float]]:
    """Of one axis: a phase, and from which value to which it reaches."""
    values = of.axes[0].values
    edges = np.flatnonzero(np.diff(of.phase)) + 1
    for first, last in zip([0, *edges], [*edges, len(values)], strict=True):
        yield int(of.phase[first]), float(values[first]), float(values[min(last, len(values) - 1)])


def _legend(of: TrainabilityMap) -> list[Spec]:
    """A square for every phase that is on the map."""
    square = {"symbol": "square", "size": 12, "line": {"color": INK, "width": 0.5}}
    return [
        {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "name": name}
        | {"marker": square | {"color": _SHADES[index]}}
        for index, name in enumerate(of.phases)
        if (of.phase == index).any()
    ]


def _mark(x: float, y: float) -> Spec:
    marker = {"symbol": "x", "size": 12, "color": COLOURS[1], "line": {"color": INK, "width": 1}}
    return {"type": "scatter", "x": [x], "y": [y], "mode": "markers", "name": "this architecture", "marker": marker}


def _axis(axis: Axis) -> Spec:
    title = {"title": {"text": escaped(axis.name)}}
    if not axis.logarithmic:
        return title
    low, high = math.log10(float(axis.values.min())), math.log10(float(axis.values.max()))
    steps = (1, 2, 5) if high - low < 4 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    shown = [tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9]
    return title | {"type": "log", "tickvals": shown, "ticktext": [f"{tick:.6g}" for tick in shown]}
