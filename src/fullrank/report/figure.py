"""Which picture a metric gets, and Plotly's figure of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fullrank.errors import TableError
from fullrank.report.heads import heads
from fullrank.report.profile import profile
from fullrank.report.series import Series
from fullrank.report.style import TEMPLATE, Spec

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["as_figure", "draw"]


def draw(series: Sequence[Series], metric: str, *, logarithmic: bool = False, **place: str | None) -> Spec:
    """Layers × heads for a metric that heads have, a profile over depth for any other and beside a theory of it.

    Args:
        series: what to draw together.
        metric: a metric that at least one of them has.
        logarithmic: whether a profile's value axis is logarithmic; heat maps know no such axis.
        **place: `scope`, `stack`, `site`, `part`, `source`.

    Returns:
        The figure as Plotly's JSON.

    Raises:
        TableError: for a metric that no series has.
    """
    rows = [row for one in series for row in one.rows if row.metric == metric]
    if not rows:
        have = ", ".join(sorted({row.metric for one in series for row in one.rows})) or "no rows"
        raise TableError(f"metric={metric!r} is not in this report; it has {have}.")
    theories = any(row.head is None and row.source.startswith("theory:") for row in rows)
    if any(row.head is not None for row in rows) and not theories:
        return heads(series, metric, **place)
    return profile(series, metric, logarithmic=logarithmic, **place)


def as_figure(spec: Spec) -> Figure:
    """A Plotly figure of the spec in this package's style."""
    import plotly.graph_objects as go

    layout: dict[str, Any] = {"template": TEMPLATE} | spec["layout"]
    return go.Figure({"data": spec["data"], "layout": layout})
