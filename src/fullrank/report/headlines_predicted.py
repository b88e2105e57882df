"""The tables that a report opens with: of a prediction the primary theory's, and one of `similarity` by all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fullrank.report.headlines import Cell, Column, Headlines, headlines
from fullrank.report.series import series_of
from fullrank.report.wording import number
from fullrank.table import Row, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["by_theory", "tables_of"]


def tables_of(report: Report) -> list[tuple[str, Headlines]]:
    """Tables with what tells their sources apart.

    Args:
        report: measured or predicted.

    Returns:
        Of every source its tables; of theories, beside the first, those that say nothing of `similarity`, which stands
        in a table of its own.
    """
    tables = []
    series = series_of((report,), ("",))
    together = by_theory(report)
    for one in series:
        compared = any(row.metric == "similarity" and row.site == "stream" for row in one.rows)
        if one.predicted and together and compared and one.rows[0].source != report.primary:
            continue
        tables += [(one.label, table) for table in headlines(one.rows)]
    return tables + [("", table) for table in together]


def by_theory(report: Report) -> list[Headlines]:
    """One table per stack of `similarity` after every block, a column for each theory, in their order of standing.

    Args:
        report: predicted.

    Returns:
        Tables; none where fewer than two theories speak.
    """
    keys = [] if report.prediction is None else [one.key for one in report.prediction.standings]
    found: dict[str, dict[str, list[Row]]] = {}
    for key in keys:
        for row in report.rows:
            if (row.source, row.metric, row.site, row.part) == (f"theory:{key}", "similarity", "stream", "out"):
                found.setdefault(row.stack, {}).setdefault(key, []).append(row)
    tables = []
    for stack, theories in found.items():
        if len(theories) < 2:
            continue
        columns, cells = [], []
        for key, rows in theories.items():
            scope = headline({row.scope for row in rows})
            columns.append(Column("similarity", key.replace("_", " "), "value", scope, unit=True))
            cells.append({row.layer: _cell(row) for row in rows if row.scope == scope})
        layers = sorted({layer for column in cells for layer in column})
        lines = tuple((layer, tuple(column.get(layer, Cell()) for column in cells)) for layer in layers)
        tables.append(Headlines(f"{stack} · similarity by theory", tuple(columns), lines))
    return tables


def _cell(row: Row) -> Cell:
    share = None if row.value is None else min(max(row.value, 0.0), 1.0)
    return Cell(number(row.value), share, said="" if row.stderr is None else f"± {number(row.stderr)}")
