"""Every number beside its references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank.table import headline
from fullrank.table.rows import KEY

if TYPE_CHECKING:
    import pandas

    from fullrank.report.report import Report

__all__ = ["ratio_frame"]

_PLACE = KEY[1:]  # without the source


def ratio_frame(report: Report) -> pandas.DataFrame:
    """One line per number that has a value: its place, the value, what its references give, its ratio to each.

    Args:
        report: with or without a reference.

    Returns:
        Columns `stack` to `metric` of the schema, `value`, `initialisation`, `null`, `to_initialisation`, `to_null`.
    """
    import pandas

    initial = {row.key[1:]: row.value for row in report.reference.rows} if report.reference is not None else {}
    scopes: dict[tuple[Any, ...], set[str]] = {}
    for row in report.rows:
        scopes.setdefault((row.stack, row.layer, row.site, row.part, row.head, row.metric), set()).add(row.scope)
    lines = []
    for row in report.rows:
        if row.value is None:
            continue
        first = headline(scopes[row.stack, row.layer, row.site, row.part, row.head, row.metric])
        of_tokens = row.site in ("stream", "read") and row.scope == first
        null = ((report.about.get("nulls") or {}).get(row.stack) or {}).get(row.metric) if of_tokens else None
        expected = initial.get(row.key[1:])
        lines.append((*row.key[1:], row.value, expected, null, _ratio(row.value, expected), _ratio(row.value, null)))
    names = [*_PLACE, "value", "initialisation", "null", "to_initialisation", "to_null"]
    numbers = dict.fromkeys(names[len(_PLACE) :], "float64") | {"layer": "int64", "head": "Int64"}
    return pandas.DataFrame(lines, columns=names).astype(numbers)


def _ratio(value: float, expected: float | None) -> float | None:
    return value / expected if expected else None
