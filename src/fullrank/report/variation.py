"""A metric against variants of a model (checkpoints, revisions, sizes): a line per layer, or variants × layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from fullrank.errors import TableError
from fullrank.report.glossary import term
from fullrank.report.means import by_layer
from fullrank.report.places import place_of
from fullrank.report.series import select
from fullrank.report.style import (
    BARE,
    COLOUR_BAR,
    MUTED,
    SEQUENTIAL,
    Spec,
    drawable,
    escaped,
    layer_axis,
    meaning,
    shade,
)
from fullrank.report.wording import number
from fullrank.table import Row, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

T = TypeVar("T")

__all__ = ["Course", "course", "lines", "sheet"]

Course = Mapping[str, Mapping[int, tuple[float, float | None]]]
"""For each variant, by layer, a value (a mean over heads where heads have the metric) and its standard error."""

_MOST_LINES = 9
"""With more layers than this, evenly spread ones are drawn."""
_LABEL = 18


def course(
    reports: Sequence[Report],
    labels: Sequence[str],
    metric: str,
    *,
    scope: str | None = None,
    stack: str | None = None,
    site: str | None = None,
    part: str | None = None,
    source: str | None = None,
) -> tuple[str, Course]:
    """What becomes of a metric from variant to variant, over the same tokens in each.

    Args:
        reports: in order.
        labels: one name each.
        metric: a metric that at least one has.
        scope: over which tokens; by default the headline of the scopes that all variants with the metric have.
        stack: only this stack.
        site: only this site; of several, the stream.
        part: only this part, or these tensors (`h.*.mlp.weight`); of several, the block output or the first attention.
        source: only this source.

    Returns:
        The scope, and values by variant and layer; a variant without the metric there is left out.

    Raises:
        TableError: where no variant has it, it stands for several stacks, or the variants have no scope in common.
    """
    asked = {"metric": metric, "scope": scope, "stack": stack, "site": site, "source": source}
    wanted = {name: value for name, value in asked.items() if value is not None}
    found: dict[str, list[Row]] = {}
    for report, label in zip(reports, labels, strict=True):
        rows = [row for row in report.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        rows = [row for row in rows if part in (None, row.part, place_of(row)[1])]
        if rows:
            found[label] = _at_one_place(rows)
    if not found:  # says what there is instead
        everything = [row for report in reports for row in report.rows]
        select(everything, metric, scope=scope, stack=stack, site=site, part=part, source=source)
    scopes = {label: {row.scope for row in rows} for label, rows in found.items()}
    common = set.intersection(*scopes.values())
    if not common:
        have = "; ".join(f"{label}: {', '.join(sorted(those))}" for label, those in scopes.items())
        raise TableError(f"{metric!r} was taken at no scope that all variants have ({have}); pass scope=.")
    chosen = headline(common)
    values = {label: by_layer(row for row in rows if row.scope == chosen) for label, rows in found.items()}
    return chosen, values


def _at_one_place(rows: list[Row]) -> list[Row]:
    """Of the rows of a metric in one report those of one place: the block output, the first attention, or the first."""
    for name in ("source", "stack"):
        have = sorted({getattr(row, name) for row in rows})
        if len(have) > 1:
            raise TableError(f"{rows[0].metric!r} stands for several values of {name}: {have}; pass {name}=.")
    for which in (0, 1):  # site, then part
        names = dict.fromkeys(place_of(row)[which] for row in rows)
        first = next((wanted for wanted in ("stream", "out", "self") if wanted in names), next(iter(names)))
        rows = [row for row in rows if place_of(row)[which] == first]
    return rows


def lines(values: Course, labels: Sequence[str], metric: str, *, scope: str = "", logarithmic: bool = False) -> Spec:
    """The metric against the variants in their order, a line per layer, from pale (first) to dark (last).

    Args:
        values: from `course`.
        labels: every variant, those without values too.
        metric: whose values they are.
        scope: said on the axis where it is not the plain one.
        logarithmic: whether the value axis is.

    Returns:
        The figure.
    """
    words = term(metric)
    layers = sorted({layer for of_variant in values.values() for layer in of_variant})
    shown = _spread(layers)
    data: list[Spec] = []
    for layer in shown:
        points = [values.get(label, {}).get(layer) for label in labels]
        spread = [drawable(point[1]) if point else None for point in points]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"layer {layer}",
                "x": list(range(len(labels))),
                "y": [drawable(point[0]) if point else None for point in points],
                "customdata": [
                    [escaped(label), number(point[0]) if point else ""] for label, point in _pairs(labels, points)
                ],
                "error_y": {"type": "data", "array": spread, "thickness": 1, "width": 0, "visible": any(spread)},
                "line": {"color": shade(layer, shown), "width": 2},
                "marker": {"color": shade(layer, shown), "size": 6},
                "hovertemplate": f"<b>%{{customdata[0]}}</b>, layer {layer}: <b>%{{customdata[1]}}</b>"
                f"<br><span style='color:{MUTED}'>{meaning(words)}</span><extra></extra>",
            }
        )
    title = escaped(f"{words.title}, {scope}" if scope not in ("", "all") else words.title)
    layout: Spec = {
        "height": 420,
        "showlegend": len(shown) > 1,
        "xaxis": _variants(labels) | {"range": [-0.3, len(labels) - 0.7]},
        "yaxis": {"title": {"text": title}, "type": "log" if logarithmic else "linear"},
        "meta": {"missing": _missing(values, labels)},
    }
    return {"data": data, "layout": layout}


def sheet(values: Course, labels: Sequence[str], metric: str, *, scope: str = "") -> Spec:
    """Variants (downwards) × layers as colours.

    Args:
        values: from `course`.
        labels: every variant, those without values too.
        metric: whose values they are.
        scope: said in the title where it is not the plain one.

    Returns:
        The figure.
    """
    words = term(metric)
    layers = sorted({layer for of_variant in values.values() for layer in of_variant})
    grid = [[values.get(label, {}).get(layer) for layer in layers] for label in labels]
    trace: Spec = {
        "type": "heatmap",
        "x": layers,
        "y": list(range(len(labels))),
        "z": [[drawable(point[0]) if point else None for point in line] for line in grid],
        "customdata": [
            [[escaped(label), number(point[0] if point else None)] for point in line]
            for label, line in _pairs(labels, grid)
        ],
        "coloraxis": "coloraxis",
        "xgap": 1.5,
        "ygap": 1.5,
        "hovertemplate": f"<b>%{{customdata[0]}}</b>, layer %{{x}}: <b>%{{customdata[1]}}</b>"
        f"<br><span style='color:{MUTED}'>{meaning(words)}</span><extra></extra>",
    }
    down = {"range": [len(labels) - 0.5, -0.5]}
    title = f"{words.title}, {scope}" if scope not in ("", "all") else words.title
    layout: Spec = {
        "height": max(260, 26 * len(labels) + 130),
        "showlegend": False,
        "title": {"text": escaped(title), "font": {"size": 14}},
        "coloraxis": {"colorscale": SEQUENTIAL, "colorbar": COLOUR_BAR},
        "xaxis": layer_axis(layers) | BARE | {"range": [layers[0] - 0.5, layers[-1] + 0.5]},
        "yaxis": _variants(labels) | BARE | down,
        "meta": {"missing": _missing(values, labels)},
    }
    return {"data": [trace], "layout": layout}


def _pairs(labels: Sequence[str], items: list[T]) -> list[tuple[str, T]]:
    return list(zip(labels, items, strict=True))


def _variants(labels: Sequence[str]) -> Spec:
    step = max(1, -(-len(labels) // 12))
    places = list(range(0, len(labels), step))
    shared = _shared(labels)
    rest = [label[len(shared) :] for label in labels]
    short = [label if len(label) <= _LABEL else f"…{label[1 - _LABEL :]}" for label in rest]
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": [escaped(short[place]) for place in places]}
    return ticks | {"title": {"text": escaped(f"{shared}…") if shared else ""}}


def _shared(labels: Sequence[str]) -> str:
    """What all labels begin with, up to a sign between words (`checkpoint-`); said once, beside the axis."""
    columns = zip(*labels, strict=False) if len(labels) > 1 else ()
    prefix = "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, columns))
    end = max((place + 1 for place, letter in enumerate(prefix) if not letter.isalnum() and letter != "."), default=0)
    return prefix[:end] if all(len(label) > end for label in labels) else ""


def _spread(layers: list[int]) -> list[int]:
    if len(layers) <= _MOST_LINES:
        return layers
    last = len(layers) - 1
    return [layers[round(index * last / (_MOST_LINES - 1))] for index in range(_MOST_LINES)]


def _missing(values: Course, labels: Sequence[str]) -> list[str]:
    absent = [label for label in labels if not values.get(label)]
    return [f"no value in {', '.join(absent)}"] if absent else []
