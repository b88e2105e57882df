"""A metric of the attention heads: layers × heads, one panel per place; of two series, both and their difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fullrank.errors import TableError
from fullrank.report.glossary import term
from fullrank.report.series import Series, select
from fullrank.report.style import (
    BARE,
    COLOUR_BAR,
    DIVERGING,
    INK,
    LIGHT,
    MOST_NUMBERS,
    MUTED,
    SEQUENTIAL,
    Spec,
    axis_key,
    axis_name,
    caption,
    drawable,
    layer_axis,
    meaning,
    panels,
    wrapped,
)
from fullrank.report.wording import at_floor, evidence, number
from fullrank.table import Row

__all__ = ["heads"]

Grid = dict[tuple[int, int], Row]


def heads(
    series: Sequence[Series],
    metric: str,
    *,
    scope: str | None = None,
    stack: str | None = None,
    site: str | None = None,
    part: str | None = None,
    source: str | None = None,
) -> Spec:
    """Heat maps with the numbers in their cells where they fit; a dash marks a number that could not be had.

    Returns:
        The figure; panels of one figure share their colours, so that they can be compared.

    Raises:
        TableError: where no series has the metric per head at that place.
    """
    words = term(metric)
    grids: list[tuple[str, Grid]] = []
    for one in series:
        rows = [row for row in one.rows if row.head is not None]
        try:
            rows = select(rows, metric, scope=scope, stack=stack, site=site, part=part, source=source)
        except TableError:  # the other series may have it
            if len(series) == 1:
                raise
            continue
        places = list(dict.fromkeys((row.stack, row.part) for row in rows))
        for place in places:
            name = " · ".join(part for part in (one.label, *(place if len(places) > 1 else ())) if part)
            scope_here = next(r.scope for r in rows if (r.stack, r.part) == place)
            name = ", ".join((name or words.title, *((scope_here,) if scope_here != "all" else ())))
            grids.append((name, {(r.layer, r.head or 0): r for r in rows if (r.stack, r.part) == place}))
    if not grids:
        raise TableError(f"no series has {metric!r} per head at this place.")
    compared = len(series) == 2 and len(grids) == 2 and bool(set(grids[0][1]) & set(grids[1][1]))
    return _figure(grids, metric, meaning(words), compared=compared)


def _figure(grids: list[tuple[str, Grid]], metric: str, definition: str, *, compared: bool) -> Spec:
    count = len(grids) + compared
    domains = panels(count, gap=0.08)
    tall = max(len({layer for layer, _ in grid}) for _, grid in grids)
    width = max(len({head for _, head in grid}) for _, grid in grids)
    values = [drawable(row.value) for _, grid in grids for row in grid.values()]
    layout: Spec = {
        "annotations": [],
        "height": max(300, 30 * tall + 120) if tall <= 30 else 16 * tall + 120,
        "coloraxis": {
            "colorscale": LIGHT if count == 1 and width <= MOST_NUMBERS else SEQUENTIAL,
            "colorbar": COLOUR_BAR | ({"x": domains[-2][1] + 0.005} if compared else {}),
            **_limits(values),
        },
        "showlegend": False,
        "margin": {"l": 60, "r": 24, "t": 40, "b": 52},
    }
    data: list[Spec] = []
    for panel, (name, grid) in enumerate(grids):
        data += _map(grid, panel, definition, numbers=count == 1, colours={"coloraxis": "coloraxis"})
        _axes(layout, grid, panel, domains[panel])
        layout["annotations"].append(caption(_fitted(name, count), domains[panel][0]))
    if compared:
        (first, grid), (second, other) = grids
        panel = count - 1
        trace, largest = _difference(grid, other, panel)
        data.append(trace)
        _axes(layout, grid, panel, domains[panel])
        layout["annotations"].append(caption(_minus(second, first, count), domains[panel][0]))
        layout["meta"] = {"largest": largest}
    layout["meta"] = layout.get("meta", {}) | {"missing": _missing(grids), "metric": metric}
    return {"data": data, "layout": layout}


def _fitted(name: str, count: int) -> str:
    """As much of a name as stands above one of `count` panels."""
    room = 120 // count
    return name if len(name) <= room else f"{name[: room - 1]}…"


def _minus(second: str, first: str, count: int) -> str:
    said = f"{second} minus {first}"
    return said if said == _fitted(said, count) else "the second minus the first"


def _cells(grid: Grid) -> tuple[list[int], list[int]]:
    return sorted({layer for layer, _ in grid}), sorted({head for _, head in grid})


def _map(grid: Grid, panel: int, definition: str, *, numbers: bool, colours: Spec) -> list[Spec]:
    layers, columns = _cells(grid)
    rows = [[grid.get((layer, head)) for head in columns] for layer in layers]
    trace: Spec = {
        "type": "heatmap",
        "x": columns,
        "y": layers,
        "z": [[drawable(row.value) if row else None for row in line] for line in rows],
        "customdata": [[_evidence(row) for row in line] for line in rows],
        "xgap": 1.5,
        "ygap": 1.5,
        "xaxis": axis_name("x", panel),
        "yaxis": axis_name("y", panel),
        "hovertemplate": "<b>layer %{y}, head %{x}: %{customdata[0]}</b><br>%{customdata[1]}"
        f"<br><span style='color:{MUTED}'>{definition}</span><extra></extra>",
        **colours,
    }
    if numbers and len(columns) <= MOST_NUMBERS:
        largest = max((abs(row.value) for line in rows for row in line if row and row.value is not None), default=0.0)
        trace["text"] = [[_short(row, largest) for row in line] for line in rows]
        trace |= {"texttemplate": "%{text}", "textfont": {"size": 12, "color": INK}}
    absent = [(row.head, row.layer, row) for line in rows for row in line if row and drawable(row.value) is None]
    if not absent:
        return [trace]
    dashes: Spec = {
        "type": "scatter",
        "mode": "text",
        "x": [head for head, _, _ in absent],
        "y": [layer for _, layer, _ in absent],
        "text": [number(row.value) for _, _, row in absent],
        "textfont": {"color": MUTED, "size": 12},
        "hoverinfo": "skip",
        "showlegend": False,
        "xaxis": trace["xaxis"],
        "yaxis": trace["yaxis"],
    }
    return [trace, dashes]


def _evidence(row: Row | None) -> list[str]:
    return [number(row.value), wrapped(evidence(row))] if row else ["not measured", ""]


def _short(row: Row | None, largest: float) -> str:
    """A number that fits a cell: two decimals, no leading zero; exponents only where the whole map is that small."""
    if row is None or row.value is None:
        return ""
    text = number(row.value)
    if abs(row.value) < 1 and largest >= 0.1:
        text = f"{row.value:.2f}".replace("-", "−")
        text = text.replace("0.", ".", 1) if text not in ("0.00", "−0.00") else "0"
    return text + ("⌊" if at_floor(row) else "")


def _difference(grid: Grid, other: Grid, panel: int) -> tuple[Spec, float]:
    layers, columns = _cells({key: grid[key] for key in grid if key in other})
    lines: list[list[float | None]] = []
    said: list[list[list[str]]] = []
    for layer in layers:
        pairs = [(grid.get((layer, head)), other.get((layer, head))) for head in columns]
        before = [drawable(row.value) if row else None for row, _ in pairs]
        after = [drawable(row.value) if row else None for _, row in pairs]
        lines.append([b - a if a is not None and b is not None else None for a, b in zip(before, after, strict=True)])
        said.append([[number(a), number(b)] for a, b in zip(before, after, strict=True)])
    largest = max((abs(value) for line in lines for value in line if value is not None), default=0.0)
    trace: Spec = {
        "type": "heatmap",
        "x": columns,
        "y": layers,
        "z": lines,
        "customdata": said,
        "colorscale": DIVERGING,
        "zmin": -(largest or 1.0),
        "zmax": largest or 1.0,
        "colorbar": COLOUR_BAR,
        "xgap": 1.5,
        "ygap": 1.5,
        "xaxis": axis_name("x", panel),
        "yaxis": axis_name("y", panel),
        "hovertemplate": "<b>layer %{y}, head %{x}: %{z:+.3g}</b>"
        "<br>%{customdata[0]} → %{customdata[1]}<extra></extra>",
    }
    return trace, largest


def _axes(layout: Spec, grid: Grid, panel: int, domain: tuple[float, float]) -> None:
    layers, columns = _cells(grid)
    layout[axis_key("x", panel)] = (
        layer_axis(columns)
        | BARE
        | {"title": {"text": "head"}, "domain": list(domain), "anchor": axis_name("y", panel)}
        | {"range": [columns[0] - 0.5, columns[-1] + 0.5]}
    )
    layout[axis_key("y", panel)] = (
        layer_axis(layers)
        | BARE
        | {"anchor": axis_name("x", panel), "range": [layers[-1] + 0.5, layers[0] - 0.5]}  # read downwards, as depth
        | ({} if panel == 0 else {"title": {"text": ""}})
    )


def _limits(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"cmin": 0, "cmax": 1}
    low, high = min(known), max(known)
    return {"cmin": low, "cmax": high} if high > low else {"cmin": low - 0.5, "cmax": high + 0.5}


def _missing(grids: list[tuple[str, Grid]]) -> list[str]:
    absent: dict[str, list[str]] = {}
    for name, grid in grids:
        for (layer, head), row in grid.items():
            if row.value is None:
                absent.setdefault(" · ".join(p for p in (name, row.note) if p), []).append(f"{layer}.{head}")
    return [f"{len(cells)} of the heads (layer.head {_list(cells)}): {note}" for note, cells in absent.items()]


def _list(cells: list[str]) -> str:
    return ", ".join(cells[:6]) + (", …" if len(cells) > 6 else "")
