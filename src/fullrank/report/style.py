"""How every figure looks: one template, colours that colour-blind readers can tell apart, panels side by side.

Figures are made as Plotly's JSON, `{"data": […], "layout": {…}}`: the page embeds it as it is, and `Report.figure`
wraps it for Python.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from fullrank.report.glossary import Term

__all__ = [
    "ACCENT",
    "BARE",
    "COLOURS",
    "COLOUR_BAR",
    "DIVERGING",
    "INK",
    "LIGHT",
    "MOST_NUMBERS",
    "MUTED",
    "SEQUENTIAL",
    "TEMPLATE",
    "Spec",
]

Spec = dict[str, Any]

INK, MUTED, RULE, PAPER = "#22262a", "#6b7278", "#e3e2dc", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, strongest first."""
ACCENT = COLOURS[1]
SEQUENTIAL = [[0, "#f7f5ee"], [0.3, "#d5e3ea"], [0.55, "#a6cadc"], [0.75, "#4f90ba"], [1, "#123f66"]]
LIGHT = [[0, "#faf8f2"], [0.35, "#d9e6ec"], [0.7, "#a3c8db"], [1, "#5f9fc6"]]
"""For cells with numbers in them: dark ink keeps a contrast above 4.5 on every shade."""
DIVERGING = [[0, "#b04a00"], [0.25, "#e5ab7d"], [0.5, "#f6f5f1"], [0.75, "#8db8cf"], [1, "#10508a"]]
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"

_AXIS = {
    "showgrid": False,
    "zeroline": False,
    "showline": True,
    "linecolor": "#b9b8b1",
    "linewidth": 1,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "#b9b8b1",
    "tickfont": {"color": MUTED, "size": 12},
    "title": {"font": {"size": 13, "color": INK}, "standoff": 10},
    "automargin": True,
}
TEMPLATE: Spec = {
    "layout": {
        "font": {"family": FONT, "size": 13, "color": INK},
        "colorway": list(COLOURS),
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 60, "r": 24, "t": 56, "b": 52},
        "hoverlabel": {
            "bgcolor": "#fffdf6",
            "bordercolor": "#b9b8b1",
            "font": {"family": FONT, "size": 13, "color": INK},
            "align": "left",
            "namelength": -1,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "xaxis": _AXIS,
        "yaxis": _AXIS | {"showgrid": True, "gridcolor": "#efeee9"},
        "hovermode": "closest",
    }
}


MOST_NUMBERS = 16
"""With more heads than this the cells of a heat map are too narrow for numbers."""
BARE: Spec = {"showgrid": False, "showline": False, "ticks": "", "zeroline": False, "ticklabelstandoff": 5}
"""An axis of a heat map: its cells are their own grid."""
COLOUR_BAR: Spec = {"thickness": 10, "outlinewidth": 0, "len": 1, "y": 0.5, "tickfont": {"size": 11, "color": MUTED}}


def shade(value: float, of: Sequence[float]) -> str:
    """A colour between pale blue (the lowest of `of`) and dark blue (the highest): an order that can be seen."""
    low, high = min(of), max(of)
    share = (value - low) / (high - low) if high > low else 1.0
    pale, dark = (0x9F, 0xC6, 0xDB), (0x12, 0x3F, 0x66)
    return "#" + "".join(f"{round(p + share * (d - p)):02x}" for p, d in zip(pale, dark, strict=True))


def escaped(text: str) -> str:
    """Text for Plotly, which reads a little HTML and %{…} in titles, names and hovers: a name must not use them."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def wrapped(text: str) -> str:
    """Text in lines short enough for a hover."""
    return "<br>".join(escaped(line) for line in textwrap.wrap(text, 60, max_lines=6, placeholder=" …"))


def meaning(words: Term) -> str:
    """A metric's definition as the last lines of a hover."""
    return wrapped(words.definition)


def layer_axis(layers: list[int]) -> Spec:
    """Integer ticks, thinned to at most about a dozen."""
    low, high = (min(layers), max(layers)) if layers else (0, 1)
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 10**6) if (high - low) / step <= 13)
    return {"title": {"text": "layer"}, "tickmode": "linear", "tick0": 0, "dtick": step}


def panels(count: int, *, gap: float = 0.09) -> list[tuple[float, float]]:
    """Horizontal domains of panels side by side."""
    width = (1 - gap * (count - 1)) / count
    return [(index * (width + gap), index * (width + gap) + width) for index in range(count)]


def axis_name(letter: str, index: int) -> str:
    """`x`, `x2`, …: how a trace calls the axis of the index-th panel (from 0)."""
    return letter if index == 0 else f"{letter}{index + 1}"


def axis_key(letter: str, index: int) -> str:
    """`xaxis`, `xaxis2`, …: how a layout calls it."""
    return f"{letter}axis" if index == 0 else f"{letter}axis{index + 1}"


def caption(text: str, x: float, *, y: float = 1.0, shift: int = 6) -> Spec:
    """A panel's title: small, left-aligned, just above it."""
    return {
        "text": escaped(text),
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": shift,
        "showarrow": False,
        "font": {"size": 12, "color": MUTED},
    }


def drawable(value: float | None) -> float | None:
    """A number that JSON and an axis can hold; None for infinities."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
