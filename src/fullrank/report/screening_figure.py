"""Pictures of a screening: profiles before and after, and differences in loss with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fullrank.errors import TableError
from fullrank.report.glossary import term
from fullrank.report.means import over_heads
from fullrank.report.series import select
from fullrank.report.style import COLOURS, INK, MUTED, Spec, drawable, escaped, layer_axis, shade
from fullrank.report.wording import number
from fullrank.table import Row

if TYPE_CHECKING:
    from fullrank.report.screening import Screening

__all__ = ["differences", "metrics_of", "profiles"]

_SHOWN = 6  # variants whose lines are there at first; a click on a name brings the others


def metrics_of(screening: Screening) -> list[str]:
    """What can be drawn: the metrics that were compared, then others that several layers have, in a report's order."""
    compared = dict.fromkeys(one.metric for row in screening.rows for one in row.restored)
    found: dict[str, set[int]] = {}
    for report in screening.profiles.values():
        for row in report.rows:
            if row.site in ("stream", "attention") and row.value is not None:
                found.setdefault(row.metric, set()).add(row.layer)
    several = [metric for metric, layers in found.items() if len(layers) > 1]
    return [metric for metric in compared if metric in several] + [one for one in several if one not in compared]


def profiles(screening: Screening, metric: str) -> Spec:
    """A metric over depth: of the model as it is, of every variant, dotted of its own initialisation.

    Args:
        screening: with profiles.
        metric: what to draw; of heads their mean.

    Returns:
        The figure as Plotly's JSON.

    Raises:
        TableError: where no profile has the metric.
    """
    base = screening.as_it_is.variant
    lines: list[tuple[str, str, str, float, list[Row]]] = []
    reports = screening.profiles
    others = [row.variant for row in screening.rows if row.variant in reports and row.variant != base]
    for index, name in enumerate(others):
        colour = COLOURS[index] if len(others) <= len(COLOURS) else shade(index, range(len(others)))
        lines.append((name, colour, "solid", 1.6, _course(reports[name].rows, metric)))
    if base in reports and reports[base].reference is not None:
        reference = reports[base].reference
        assert reference is not None
        lines.append(("own initialisation", MUTED, "dot", 1.6, _course(reference.rows, metric)))
    if base in reports:
        lines.append((base, INK, "solid", 2.6, _course(reports[base].rows, metric)))
    lines = [line for line in lines if line[-1]]
    if not lines:
        have = ", ".join(metrics_of(screening)) or "none"
        raise TableError(f"metric={metric!r} is in no profile of this screening; there are {have}.")
    shown = {base, "own initialisation", *others[:_SHOWN]}
    data = []
    for name, colour, dash, thick, rows in lines:
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escaped(name),
                "x": [row.layer for row in rows],
                "y": [drawable(row.value) for row in rows],
                "customdata": [number(row.value) for row in rows],
                "line": {"color": colour, "dash": dash, "width": thick},
                "marker": {"size": 4 if dash == "dot" or len(rows) > 16 else 6, "color": colour},
                "visible": True if name in shown else "legendonly",
                "hovertemplate": f"<b>{escaped(name)}</b><br>layer %{{x}}: %{{customdata}}<extra></extra>",
            }
        )
    layers = sorted({row.layer for *_, rows in lines for row in rows})
    axis = layer_axis(layers) | {"range": [layers[0] - 0.4, layers[-1] + 0.4]}
    title = {"title": {"text": escaped(term(metric).title)}}
    return {"data": data, "layout": {"height": 430, "xaxis": axis, "yaxis": title, "showlegend": True}}


def _course(rows: Iterable[Row], metric: str) -> list[Row]:
    """The rows of a metric after each block, of the first stack that has it."""
    of_metric = [row for row in rows if row.metric == metric and row.value is not None]
    whole = [row for row in of_metric if row.head is None] or over_heads(of_metric)
    for site in ("stream", "attention"):
        here = [row for row in whole if row.site == site and row.part in ("out", "self")]
        if here:
            return sorted(select(here, metric, stack=here[0].stack), key=lambda row: row.layer)
    return []


def differences(screening: Screening) -> Spec:
    """What every candidate loses beyond the model as it is, with its interval, in the order of the ranking.

    Args:
        screening: with training.

    Returns:
        The figure as Plotly's JSON.

    Raises:
        TableError: where nothing was trained.
    """
    rows = [row for row in screening.candidates if row.change is not None][::-1]
    if not rows:
        raise TableError("there are no differences in loss to draw: nothing was trained against the model as it is.")
    names = [escaped(row.variant) for row in rows]
    changes = [row.change for row in rows if row.change is not None]
    better = [change.shown and change.mean < 0 for change in changes]
    colours = [
        COLOURS[2] if good else (COLOURS[1] if change.shown else MUTED)
        for good, change in zip(better, changes, strict=True)
    ]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [drawable(change.mean) for change in changes],
        "y": names,
        "marker": {"size": 9, "color": colours},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [drawable(max(0.0, (c.high if c.high is not None else c.mean) - c.mean)) for c in changes],
            "arrayminus": [drawable(max(0.0, c.mean - (c.low if c.low is not None else c.mean))) for c in changes],
            "color": MUTED,
            "thickness": 1.2,
            "width": 4,
        },
        "hovertemplate": "<b>%{y}</b><br>%{x:.3f}<extra></extra>",
    }
    zero = {"type": "line", "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1}
    return {
        "data": [trace],
        "layout": {
            "height": 84 + 30 * len(rows),
            "margin": {"t": 30},
            "showlegend": False,
            "xaxis": {"title": {"text": "loss less that of the model as it is, in nats"}},
            "yaxis": {"type": "category"},
            "shapes": [zero | {"line": {"color": INK, "width": 1, "dash": "dash"}}],
        },
    }
