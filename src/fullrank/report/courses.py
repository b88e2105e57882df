"""What the page's section on variants draws: every metric against them, and variants × layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank.report.embedded import chooser
from fullrank.report.means import by_layer
from fullrank.report.places import place_of, place_words
from fullrank.report.variation import lines, sheet
from fullrank.table import Row, context_of

if TYPE_CHECKING:
    from fullrank.report.variants import Variants

__all__ = ["courses"]

_FIRST = ("token_energy", "similarity", "centered_stable_rank", "normalized_entropy")


def courses(variants: Variants) -> dict[str, Any]:
    """A figure of lines and one of colours for every metric, place and scope, with what is shown first.

    Args:
        variants: the reports and their labels.

    Returns:
        `figures`, `first` and `headline`, as the page's other choosers have them.
    """
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for report, label in zip(variants.reports, variants.labels, strict=True):
        for row in report.rows:
            if context_of(row.scope) is None:  # numbers by context have a section of their own
                key = (row.metric, row.stack, *place_of(row), row.scope, row.source)
                groups.setdefault(key, {}).setdefault(label, []).append(row)
    several = len({source for *_, source in groups}) > 1
    figures = []
    for (metric, stack, site, part, scope, source), found in groups.items():
        values = {label: by_layer(rows) for label, rows in found.items()}
        if not any(values.values()):
            continue
        heads = any(row.head is not None for rows in found.values() for row in rows)
        name = " · ".join((stack, _words(site, part, heads=heads), *((source,) if several else ())))
        drawn = {
            "figure": lines(values, variants.labels, metric, scope=scope),
            "sheet": sheet(values, variants.labels, metric, scope=scope),
        }
        figures.append({"metric": metric, "place": name, "scope": scope, **drawn})
    return chooser(figures, _FIRST)


def _words(site: str, part: str, *, heads: bool) -> str:
    words = place_words(site, part) + (" attention" if site == "attention" else "")
    return f"{words}, mean over heads" if heads else words
