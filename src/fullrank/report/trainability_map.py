"""A map of what trains: phases over one or two fields of an architecture, with its own place marked."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fullrank.report.document import dumps
from fullrank.report.style import COLOURS, INK, TEMPLATE, Spec
from fullrank.report.wording import number
from fullrank.table import write_atomically

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["Axis", "TrainabilityMap"]

_SHADES = ("#e3efe8", "#f3d9c4", "#d9d3ea", "#e4e4e4")
_SIGNS = (".", "#", "*", "!")
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Axis:
    """A field that varies.

    Attributes:
        name: of a field or a shorthand.
        values: that it takes.
        own: the architecture's own; None where it has several.
    """

    name: str
    values: NDArray[np.float64]
    own: float | None

    @property
    def logarithmic(self) -> bool:
        """Whether values are positive and span more than a factor of five."""
        return bool((self.values > 0).all() and self.values.max() > 5 * self.values.min())

    def nearest(self) -> int | None:
        """Index of the value nearest to the architecture's own; None where that lies outside, or is unknown."""
        if self.own is None or not self.values.min() <= self.own <= self.values.max():
            return None
        if self.logarithmic:
            return int(np.abs(np.log(self.values / self.own)).argmin())
        return int(np.abs(self.values - self.own).argmin())


@dataclass(frozen=True)
class TrainabilityMap:
    """Phases over one or two axes.

    Attributes:
        architecture: in words.
        axes: one or two.
        phases: names of the phases.
        phase: index into `phases` at every point, of the axes' shape.
        similarity: of tokens after the last block.
        gauge: largest of any block: logits' spread over √log of the keys.
    """

    architecture: str
    axes: tuple[Axis, ...]
    phases: tuple[str, ...]
    phase: NDArray[np.intp]
    similarity: NDArray[np.float64]
    gauge: NDArray[np.float64]

    @property
    def here(self) -> str | None:
        """The phase at the point that is nearest to the architecture's own place; None where that is not on the map."""
        places = [axis.nearest() for axis in self.axes]
        if any(place is None for place in places):
            return None
        return self.phases[int(self.phase[tuple(int(place or 0) for place in places)])]

    def shares(self) -> dict[str, float]:
        """What part of the points each phase has."""
        return {name: float((self.phase == index).mean()) for index, name in enumerate(self.phases)}

    @property
    def table(self) -> pandas.DataFrame:
        """One line a point: the fields' values, phase, similarity, gauge."""
        import pandas

        grids = np.meshgrid(*(axis.values for axis in self.axes), indexing="ij")
        columns: dict[str, Any] = {axis.name: grid.ravel() for axis, grid in zip(self.axes, grids, strict=True)}
        columns["phase"] = [self.phases[index] for index in self.phase.ravel()]
        return pandas.DataFrame(columns | {"similarity": self.similarity.ravel(), "gauge": self.gauge.ravel()})

    def to_json(self) -> str:
        """One JSON document: the axes, and the arrays in their shape."""
        return dumps(
            {
                "architecture": self.architecture,
                "axes": [{"name": a.name, "values": a.values.tolist(), "own": a.own} for a in self.axes],
                "phases": list(self.phases),
                "here": self.here,
                "phase": self.phase.tolist(),
                "similarity": np.round(self.similarity, 6).tolist(),
                "gauge": np.round(self.gauge, 6).tolist(),
            }
        )

    # ---------------------------------------------------------------- pictures

    def figure(self) -> Figure:
        """Of two fields a plane coloured by phase, lines of equal similarity on it; of one the similarity along it."""
        import plotly.graph_objects as go

        spec = self._plane() if len(self.axes) == 2 else self._line()
        return go.Figure({"data": spec["data"], "layout": {"template": TEMPLATE} | spec["layout"]})

    def _plane(self) -> Spec:
        across, up = self.axes
        x, y = across.values.tolist(), up.values.tolist()
        last = len(self.phases) - 1
        steps = [[(index + edge) / (last + 1), _SHADES[index]] for index in range(last + 1) for edge in (0, 1)]
        words = [[self.phases[index] for index in line] for line in self.phase.T]
        data: list[Spec] = [
            {
                "type": "heatmap",
                "x": x,
                "y": y,
                "z": self.phase.T.tolist(),
                "zmin": -0.5,
                "zmax": last + 0.5,
                "colorscale": steps,
                "showscale": False,
                "customdata": [
                    [[word, number(rho)] for word, rho in zip(line, rhos, strict=True)]
                    for line, rhos in zip(words, self.similarity.T.tolist(), strict=True)
                ],
                "hovertemplate": f"{across.name} %{{x:.3g}}<br>{up.name} %{{y:.3g}}<br>%{{customdata[0]}}, similarity "
                "%{customdata[1]}<extra></extra>",
            },
            {
                "type": "contour",
                "x": x,
                "y": y,
                "z": self.similarity.T.tolist(),
                "contours": {"coloring": "none", "showlabels": True, "start": 0.1, "end": 0.9, "size": 0.2},
                "line": {"color": INK, "width": 1},
                "showscale": False,
                "hoverinfo": "skip",
                "name": "similarity after the last block",
            },
        ]
        data += [
            {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "name": name}
            | {
                "marker": {
                    "symbol": "square",
                    "size": 12,
                    "color": _SHADES[index],
                    "line": {"color": INK, "width": 0.5},
                }
            }
            for index, name in enumerate(self.phases)
            if (self.phase == index).any()
        ]
        if across.own is not None and up.own is not None:
            data.append(_mark(across.own, up.own))
        layout = {"height": 560, "xaxis": _axis(across), "yaxis": _axis(up), "showlegend": True}
        return {"data": data, "layout": layout}

    def _line(self) -> Spec:
        (axis,) = self.axes
        data: list[Spec] = [
            {
                "type": "scatter",
                "x": axis.values.tolist(),
                "y": self.similarity.tolist(),
                "mode": "lines+markers",
                "name": "similarity after the last block",
                "line": {"color": COLOURS[0]},
                "marker": {"size": 4},
                "text": [self.phases[index] for index in self.phase],
                "hovertemplate": f"{axis.name} %{{x:.3g}}: %{{y:.3f}}, %{{text}}<extra></extra>",
            }
        ]
        shapes = [
            {"type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1, "layer": "below"}
            | {"fillcolor": _SHADES[index], "line": {"width": 0}}
            for index, first, last in self._stretches()
        ]
        data += [
            {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "name": name}
            | {
                "marker": {
                    "symbol": "square",
                    "size": 12,
                    "color": _SHADES[index],
                    "line": {"color": INK, "width": 0.5},
                }
            }
            for index, name in enumerate(self.phases)
            if (self.phase == index).any()
        ]
        place = axis.nearest()
        if axis.own is not None and place is not None:
            data.append(_mark(axis.own, float(self.similarity[place])))
        layout = {"height": 420, "xaxis": _axis(axis), "showlegend": True, "shapes": shapes}
        return {"data": data, "layout": layout | {"yaxis": {"title": {"text": "similarity"}, "range": [-0.02, 1.02]}}}

    def _stretches(self) -> Iterator[tuple[int, float, float]]:
        """Of one axis: a phase, and from which value to which it reaches."""
        values = self.axes[0].values
        edges = np.flatnonzero(np.diff(self.phase)) + 1
        for first, last in zip([0, *edges], [*edges, len(values)], strict=True):
            yield int(self.phase[first]), float(values[first]), float(values[min(last, len(values) - 1)])

    # ---------------------------------------------------------------- files and display

    def to_html(self) -> str:
        """A page with the figure, which asks nothing of the network."""
        from plotly.offline import get_plotlyjs

        figure = json.dumps(json.loads(self.figure().to_json())).replace("<", "\\u003c")
        title = " and ".join(axis.name for axis in self.axes)
        return (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\">"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>What trains: {html.escape(title)}</title>"
            "<style>body{margin:0 auto;max-width:1000px;padding:24px;background:#fdfcf9;color:#22262a;"
            "font:15px/1.5 system-ui,'Segoe UI','Liberation Sans',Arial,sans-serif;overflow-wrap:break-word}"
            "h1{font-size:24px}p{max-width:80ch}</style>"
            f"<script>{get_plotlyjs()}</script></head><body><h1>What trains: {html.escape(title)}</h1>"
            f"<p>{html.escape(self._said())}</p><div id='map'></div>"
            f"<script>const f={figure};Plotly.newPlot('map',f.data,f.layout,{{responsive:true,displaylogo:false}});"
            "</script></body></html>"
        )

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    def _said(self) -> str:
        parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares().items() if share)
        here = "is not on this map" if self.here is None else f"is {self.here}"
        return (
            f"{self.architecture}. Of {self.phase.size:,} points: {parts}; the architecture itself {here}. By the "
            "mean-field map of arXiv 2505.24333, at initialisation."
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield Text(self._said(), overflow="fold")
        yield Text()
        yield from (Text(line) for line in self._drawn(min(options.max_width - 12, 72)))
        signs = "   ".join(
            f"{_SIGNS[index]} {name}" for index, name in enumerate(self.phases) if (self.phase == index).any()
        )
        yield Text(f"\n{signs}   @ this architecture", style="dim")

    def _drawn(self, width: int) -> Iterator[str]:
        """The map in characters: the first axis to the right, the second up."""
        across, up = self.axes[0], self.axes[1] if len(self.axes) == 2 else None
        columns = np.unique(np.linspace(0, len(across.values) - 1, min(width, len(across.values))).astype(int))
        lines = (
            [0] if up is None else np.unique(np.linspace(0, len(up.values) - 1, min(20, len(up.values))).astype(int))
        )
        own = across.nearest()
        column = None if own is None else int(np.abs(columns - own).argmin())
        beside = 0 if up is None else up.nearest()
        row = None if beside is None else int(np.abs(np.asarray(lines) - beside).argmin())
        for index in range(len(lines) - 1, -1, -1):
            phase = self.phase if up is None else self.phase[:, lines[index]]
            signs = [_SIGNS[int(phase[at])] for at in columns]
            if column is not None and index == row:
                signs[column] = "@"
            label = "" if up is None else number(float(up.values[lines[index]]))
            yield f"{label:>9} {''.join(signs)}"
        first, last = (number(float(across.values[at])) for at in (0, -1))
        yield f"{'':>9} {first}{' ' * max(1, len(columns) - len(first) - len(last))}{last}  {across.name}"
        if up is not None:
            yield f"{'':>9} upwards: {up.name}"


def _axis(axis: Axis) -> Spec:
    return {"title": {"text": html.escape(axis.name)}, "type": "log" if axis.logarithmic else "linear"}


def _mark(x: float, y: float) -> Spec:
    marker = {"symbol": "x", "size": 12, "color": COLOURS[1], "line": {"color": INK, "width": 1}}
    return {"type": "scatter", "x": [x], "y": [y], "mode": "markers", "name": "this architecture", "marker": marker}
