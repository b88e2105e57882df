"""A number against the context: one line per layer, with the band of its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fullrank.errors import TableError
from fullrank.report.glossary import Term, term
from fullrank.report.means import entering, mean_of
from fullrank.report.places import place_words
from fullrank.report.series import Series
from fullrank.report.steepness import slope_figure
from fullrank.report.style import COLOUR_BAR, MUTED, Spec, drawable, escaped, layer_axis, meaning, shade, wrapped
from fullrank.report.trends import contexts_of
from fullrank.report.wording import evidence, number
from fullrank.table import Row, context_of, headline, in_context, without_context

__all__ = ["Place", "by_context", "context_figures"]

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
            scope, context = without_context(row.scope)
            if context is not None and row.value is not None:  # of what is missing everywhere the notes tell
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

    Of a metric that heads have, the line is the mean over heads, and the band what its standard error cannot exceed
    (`means.mean_of`).

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
    everything = [row for one in series for row in one.rows if context_of(row.scope) is not None]
    rows = [row for row in everything if row.metric == metric]
    if not rows:
        have = sorted({row.metric for row in everything})
        said = f"it has {', '.join(have)}" if have else "pass contexts= to examine"
        raise TableError(f"metric={metric!r} was not taken at several contexts in this report; {said}.")
    place = place or _only_place(rows, metric, where)
    rows = [row for row in rows if (row.stack, row.site, row.part) == place]
    scopes = {without_context(row.scope)[0] for row in rows}
    scope = scope or headline(scopes)
    words, contexts = term(metric), contexts_of(rows)
    wanted = {in_context(scope, context) for context in contexts}
    layers = sorted({row.layer for row in rows})
    data: list[Spec] = []
    for index, one in enumerate(series):
        mine = [r for r in one.rows if r.metric == metric and (r.stack, r.site, r.part) == place]
        mine = [r for r in mine if r.scope in wanted]
        for layer in sorted({row.layer for row in mine}):
            points = _points([row for row in mine if row.layer == layer])
            colour = shade(layer, layers)
            name = " · ".join(p for p in (one.label, f"layer {layer}") if p)
            data += _line(points, name, colour, _DASHES[index % len(_DASHES)], words, band=_BAND / len(layers) ** 0.5)
    if not data:
        raise TableError(f"no rows of {metric!r} over several contexts with scope={scope!r}; scopes: {sorted(scopes)}.")
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
        "meta": {"missing": _missing([row for row in rows if row.scope in wanted])},
    }
    return {"data": data, "layout": layout}


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
        known = entering(here)
        if known:
            said = evidence(known[0]) if len(known) == 1 else f"mean of {len(known)} heads"
            found.append((context, *mean_of(known), said))
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
    bar = COLOUR_BAR | {"title": {"text": "layer", "font": {"size": 12}}, "len": 0.94, "y": 0.47}
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
            "colorbar": bar | {"dtick": step, "tick0": 0},
        },
    }


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _missing(rows: Sequence[Row]) -> list[str]:
    said: dict[str, set[int]] = {}
    for row in rows:
        context = context_of(row.scope)
        if row.value is None and context is not None:
            said.setdefault(row.note, set()).add(context)
    return [f"at {', '.join(map(str, sorted(contexts)))} tokens: {note}" for note, contexts in said.items()]
