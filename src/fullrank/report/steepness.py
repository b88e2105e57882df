"""How steep: the change of a number per doubling of the context, head by head or layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fullrank.report.glossary import Term, term
from fullrank.report.style import (
    BARE,
    COLOUR_BAR,
    COLOURS,
    DIVERGING,
    INK,
    MOST_NUMBERS,
    MUTED,
    PAPER,
    Spec,
    drawable,
    escaped,
    layer_axis,
    meaning,
)
from fullrank.report.trends import interval
from fullrank.report.wording import number
from fullrank.table import Slope

__all__ = ["slope_figure"]


def slope_figure(slopes: Sequence[Slope], metric: str) -> Spec:
    """How steep: layers × heads as colours with the interval in the hover, or layers with their intervals as bars.

    Numbers stand in the cells whose 95 % interval leaves out 0.

    Returns:
        The figure.
    """
    words = term(metric)
    if any(slope.head is not None for slope in slopes):
        return _heads(slopes, words)
    return _layers(slopes, words)


def _told(slope: Slope) -> list[str]:
    said = [interval(slope), f"n = {slope.n}", f"contexts {', '.join(map(str, slope.contexts))}"]
    if slope.exponent is not None:
        ends = (slope.exponent_low, slope.exponent_high)
        within = f" ({number(ends[0])} to {number(ends[1])})" if None not in ends else ""
        said.insert(1, f"like context^{slope.exponent:.2f}{within}")
    signed = number(slope.per_doubling)
    return [f"+{signed}" if (slope.per_doubling or 0) > 0 else signed, "<br>".join(map(escaped, said))]


def _heads(slopes: Sequence[Slope], words: Term) -> Spec:
    grid = {(slope.layer, slope.head): slope for slope in slopes if slope.head is not None}
    layers = sorted({layer for layer, _ in grid})
    heads = sorted({head for _, head in grid if head is not None})
    lines = [[grid.get((layer, head)) for head in heads] for layer in layers]
    values = [s.per_doubling for s in grid.values() if s.per_doubling is not None and math.isfinite(s.per_doubling)]
    largest = max(map(abs, values), default=0.0) or 1.0
    trace: Spec = {
        "type": "heatmap",
        "x": heads,
        "y": layers,
        "z": [[drawable(slope.per_doubling) if slope else None for slope in line] for line in lines],
        "customdata": [[_told(slope) if slope else ["–", "not measured"] for slope in line] for line in lines],
        "xgap": 1.5,
        "ygap": 1.5,
        "coloraxis": "coloraxis",
        "hovertemplate": "<b>layer %{y}, head %{x}: %{customdata[0]} per doubling</b><br>%{customdata[1]}"
        f"<br><span style='color:{MUTED}'>{meaning(words)}</span><extra></extra>",
    }
    if len(heads) <= MOST_NUMBERS:
        texts = [[_short(slope, largest) for slope in line] for line in lines]
        trace |= {"text": texts, "texttemplate": "%{text}", "textfont": {"size": 12, "color": INK}}
    layout: Spec = {
        "height": max(240, 30 * len(layers) + 110) if len(layers) <= 30 else 16 * len(layers) + 110,
        "showlegend": False,
        "coloraxis": {"colorscale": _PALE, "cmin": -largest, "cmax": largest, "colorbar": COLOUR_BAR},
        "xaxis": layer_axis(heads) | BARE | {"title": {"text": "head"}, "range": [heads[0] - 0.5, heads[-1] + 0.5]},
        "yaxis": layer_axis(layers) | BARE | {"range": [layers[-1] + 0.5, layers[0] - 0.5]},
        "margin": {"l": 60, "r": 24, "t": 30, "b": 52},
    }
    return {"data": [trace], "layout": layout}


_PALE = [[0, "#d98f55"], [0.25, DIVERGING[1][1]], [0.5, "#f6f5f1"], [0.75, "#a9cbdc"], [1, "#6fa8cb"]]
"""Falling orange, rising blue; light enough for dark numbers on every shade."""


def _short(slope: Slope | None, largest: float) -> str:
    if slope is None or slope.per_doubling is None or not slope.significant:
        return ""
    if largest < 0.1 or largest >= 100:
        return number(slope.per_doubling)
    text = f"{slope.per_doubling:+.2f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(slope.per_doubling) < 1 else text


def _layers(slopes: Sequence[Slope], words: Term) -> Spec:
    known = [slope for slope in sorted(slopes, key=lambda one: one.layer) if slope.per_doubling is not None]
    above = [None if s.high is None else drawable(s.high - (s.per_doubling or 0)) for s in known]
    below = [None if s.low is None else drawable((s.per_doubling or 0) - s.low) for s in known]
    trace: Spec = {
        "type": "scatter",
        "mode": "markers",
        "x": [slope.layer for slope in known],
        "y": [drawable(slope.per_doubling) for slope in known],
        "customdata": [_told(slope) for slope in known],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "thickness": 1.4,
            "width": 0,
            "color": COLOURS[0],
        },
        "marker": {
            "size": 8,
            "color": [COLOURS[0] if slope.significant else PAPER for slope in known],
            "line": {"color": COLOURS[0], "width": 1.6},
        },
        "hovertemplate": "<b>layer %{x}: %{customdata[0]} per doubling</b><br>%{customdata[1]}"
        f"<br><span style='color:{MUTED}'>{meaning(words)}</span><extra></extra>",
    }
    layout: Spec = {
        "height": 300,
        "showlegend": False,
        "xaxis": layer_axis([slope.layer for slope in known]),
        "yaxis": {"title": {"text": escaped(f"{words.name.replace('_', ' ')} per doubling")}},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": MUTED, "width": 1}}
        ],
        "margin": {"l": 60, "r": 24, "t": 30, "b": 52},
    }
    return {"data": [trace], "layout": layout}
