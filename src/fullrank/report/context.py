"""A number against the context: one line per layer with its band, and how steep each layer or head is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fullrank.errors import TableError
from fullrank.report.glossary import Term, term
from fullrank.report.profile import place_words
from fullrank.report.series import Series
from fullrank.report.style import (
    COLOURS,
    DIVERGING,
    INK,
    MUTED,
    PAPER,
    Spec,
    drawable,
    escaped,
    layer_axis,
    meaning,
    shade,
    wrapped,
)
from fullrank.report.trends import context_of, contexts_of, interval
from fullrank.report.wording import evidence, number
from fullrank.table import Row, Slope, headline

__all__ = ["Place", "by_context", "context_figures", "slope_figure"]

_MOST_NUMBERS = 16
_BAND = 0.3
"""How dense a single band is; of many layers each is paler, so that where they overlap the lines stay seen."""
_DASHES = ("solid", "dash", "dot", "dashdot")

Place = tuple[str, str, str]
"""Stack, site and part."""


def context_figures(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Every metric, place and scope that was taken at several contexts, with both of its figures, for the page."""
    found = []
    several = sum(bool(contexts_of(one.rows)) for one in series) > 1
    for one in series:
        keys: dict[tuple[str, Place, str], None] = {}
        for row in one.rows:
            scope = _without(row.scope)
            if scope is not None:
                keys[row.metric, (row.stack, row.site, row.part), scope] = None
        for metric, place, scope in keys:
            name = " · ".join((*((one.label,) if several else ()), _name(place)))
            figure = by_context([one], metric, place=place, scope=scope)
            slopes = [s for s in one.slopes if (s.metric, (s.stack, s.site, s.part), s.scope) == (metric, place, scope)]
            steep = slope_figure(slopes, metric) if slopes else None
            found.append({"metric": metric, "place": name, "scope": scope, "figure": figure, "slopes": steep})
    return found


def by_context(
    series: Sequence[Series], metric: str, *, place: Place | None = None, scope: str | None = None, **where: str | None
) -> Spec:
    """Value against context on a logarithmic axis, one line per layer, dark for deep ones; bands are standard errors.

    Of a metric that heads have, the line is the mean over heads, and the band the mean of their standard errors, which
    the standard error of that mean cannot exceed.

    Args:
        series: what to draw together; each gets a dash of its own.
        metric: its name.
        place: stack, site and part.
        scope: over which tokens; by default the headline.
        **where: `stack`, `site`, `part`, where `place` is not given.

    Returns:
        The figure.

    Raises:
        TableError: where nothing was taken at several contexts, or several places are meant.
    """
    rows = [row for one in series for row in one.rows if row.metric == metric and _without(row.scope) is not None]
    if not rows:
        have = sorted({row.metric for one in series for row in one.rows if _without(row.scope) is not None})
        said = f"it has {', '.join(have)}" if have else "pass contexts= to examine"
        raise TableError(f"metric={metric!r} was not taken at several contexts in this report; {said}.")
    place = place or _only_place(rows, metric, where)
    rows = [row for row in rows if (row.stack, row.site, row.part) == place]
    scope = scope or headline({str(_without(row.scope)) for row in rows})
    words, contexts = term(metric), contexts_of(rows)
    layers = sorted({row.layer for row in rows})
    data: list[Spec] = []
    for index, one in enumerate(series):
        mine = [r for r in one.rows if r.metric == metric and (r.stack, r.site, r.part) == place]
        mine = [r for r in mine if _without(r.scope) == scope]
        for layer in sorted({row.layer for row in mine}):
            points = _points([row for row in mine if row.layer == layer])
            colour = shade(layer, layers)
            name = " · ".join(p for p in (one.label, f"layer {layer}") if p)
            data += _line(points, name, colour, _DASHES[index % len(_DASHES)], words, band=_BAND / len(layers) ** 0.5)
    if not data:
        scopes = sorted({str(_without(row.scope)) for row in rows})
        raise TableError(f"no rows of {metric!r} over several contexts with scope={scope!r}; scopes: {scopes}.")
    if len(layers) > 1:
        data.append(_scale(layers))
    mean = any(row.head is not None for row in rows)
    title = words.title + (", mean over heads" if mean else "") + (f", {scope}" if scope != "all" else "")
    layout: Spec = {
        "height": 420,
        "showlegend": False,
        "xaxis": {
            "type": "log",
            "title": {"text": "context (tokens)"},
            "tickmode": "array",
            "tickvals": contexts,
            "ticktext": [f"{context:,}".replace(",", " ") for context in contexts],
        },
        "yaxis": {"title": {"text": escaped(title)}},
        "margin": {"l": 60, "r": 24, "t": 30, "b": 52},
        "meta": {"missing": _missing(rows, scope)},
    }
    return {"data": data, "layout": layout}


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


def _without(scope: str) -> str | None:
    """The scope without its context; None where it has none."""
    context = context_of(scope)
    return None if context is None else scope.removesuffix(f"+context={context}")


def _name(place: Place) -> str:
    stack, site, part = place
    return f"{stack} · {part}" if site == "attention" else f"{stack} · {place_words(site, part)}"


def _only_place(rows: Sequence[Row], metric: str, where: dict[str, str | None]) -> Place:
    asked = {name: wanted for name, wanted in where.items() if wanted is not None}
    places = list(dict.fromkeys((row.stack, row.site, row.part) for row in rows))
    left = [
        p for p in places if all(dict(zip(("stack", "site", "part"), p, strict=True))[n] == w for n, w in asked.items())
    ]
    if len(left) > 1 and len({stack for stack, _, _ in left}) == 1 and ("stream", "out") in {p[1:] for p in left}:
        left = [p for p in left if p[1:] == ("stream", "out")]  # what a block hands on comes first
    if len(left) != 1:
        found = "; ".join(" ".join(p) for p in left or places)
        raise TableError(f"{metric!r} by context needs one place; pass stack=, site=, part=: {found}.")
    return left[0]


def _points(rows: Sequence[Row]) -> list[tuple[int, float, float | None, str]]:
    """(context, value, half width of the band, evidence) at every context with a value."""
    found = []
    for context in contexts_of(rows):
        here = [row for row in rows if context_of(row.scope) == context]
        known = [row for row in here if row.value is not None and math.isfinite(row.value)]
        if not known:
            continue
        value = sum(float(row.value or 0) for row in known) / len(known)
        errors = [row.stderr for row in known if row.stderr is not None]
        spread = sum(errors) / len(errors) if len(errors) == len(known) else None
        said = evidence(known[0]) if len(known) == 1 else f"mean of {len(known)} heads"
        found.append((context, value, spread, said))
    return found


def _line(
    points: Sequence[tuple[int, float, float | None, str]],
    name: str,
    colour: str,
    dash: str,
    words: Term,
    *,
    band: float,
) -> list[Spec]:
    if not points:
        return []
    banded = [(context, value, spread) for context, value, spread, _ in points if spread is not None]
    traces: list[Spec] = []
    if len(banded) > 1:
        traces.append(
            {
                "type": "scatter",
                "mode": "none",
                "x": [c for c, _, _ in banded] + [c for c, _, _ in reversed(banded)],
                "y": [drawable(v + s) for _, v, s in banded] + [drawable(v - s) for _, v, s in reversed(banded)],
                "fill": "toself",
                "fillcolor": f"rgba{(*_channels(colour), round(band, 3))}",
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escaped(name),
            "x": [context for context, _, _, _ in points],
            "y": [drawable(value) for _, value, _, _ in points],
            "customdata": [[escaped(name), number(value), wrapped(said)] for _, value, _, said in points],
            "line": {"color": colour, "width": 1.8, "dash": dash},
            "marker": {"color": colour, "size": 6},
            "hovertemplate": "<b>%{customdata[0]}, %{x} tokens: %{customdata[1]}</b><br>%{customdata[2]}"
            f"<br><span style='color:{MUTED}'>{meaning(words)}</span><extra></extra>",
        }
    )
    return traces


def _scale(layers: Sequence[int]) -> Spec:
    """A colour bar that says which line is which layer; the point that carries it is not drawn."""
    step = layer_axis(list(layers))["dtick"]
    bar = {"title": {"text": "layer", "font": {"size": 12}}, "thickness": 10, "outlinewidth": 0, "len": 0.94, "y": 0.47}
    colours = [[(layer - layers[0]) / (layers[-1] - layers[0]), shade(layer, layers)] for layer in layers]
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "showlegend": False,
        "hoverinfo": "skip",
        "marker": {
            "color": [layers[0]],
            "cmin": layers[0],
            "cmax": layers[-1],
            "colorscale": colours,
            "showscale": True,
            "colorbar": bar | {"dtick": step, "tick0": 0, "tickfont": {"size": 11, "color": MUTED}},
        },
    }


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _missing(rows: Sequence[Row], scope: str) -> list[str]:
    said: dict[str, set[int]] = {}
    for row in rows:
        context = context_of(row.scope)
        if row.value is None and context is not None and _without(row.scope) == scope:
            said.setdefault(row.note, set()).add(context)
    return [f"at {', '.join(map(str, sorted(contexts)))} tokens: {note}" for note, contexts in said.items()]


# ------------------------------------------------------------ slopes


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
    bare = {"showgrid": False, "showline": False, "ticks": "", "zeroline": False, "ticklabelstandoff": 5}
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
    if len(heads) <= _MOST_NUMBERS:
        texts = [[_short(slope, largest) for slope in line] for line in lines]
        trace |= {"text": texts, "texttemplate": "%{text}", "textfont": {"size": 12, "color": INK}}
    bar = {"thickness": 10, "outlinewidth": 0, "len": 1, "y": 0.5, "tickfont": {"size": 11, "color": MUTED}}
    layout: Spec = {
        "height": max(240, 30 * len(layers) + 110) if len(layers) <= 30 else 16 * len(layers) + 110,
        "showlegend": False,
        "coloraxis": {"colorscale": _PALE, "cmin": -largest, "cmax": largest, "colorbar": bar},
        "xaxis": layer_axis(heads) | bare | {"title": {"text": "head"}, "range": [heads[0] - 0.5, heads[-1] + 0.5]},
        "yaxis": layer_axis(layers) | bare | {"range": [layers[-1] + 0.5, layers[0] - 0.5]},
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
    return f"{slope.per_doubling:+.2f}".replace("-", "−").replace("0.", ".", 1)


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
