"""What the page's section on variants draws: every metric against them, and variants × layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank.report.series import series_of
from fullrank.report.variation import course, lines, sheet
from fullrank.table import headline

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
    reports, labels = variants.reports, variants.labels
    rows = [row for one in series_of(reports, labels) for row in one.rows]
    keys = dict.fromkeys((row.metric, row.stack, row.site, row.part, row.scope, row.source) for row in rows)
    figures = []
    scopes: dict[str, set[str]] = {}
    several = len({key[-1] for key in keys}) > 1
    for metric, stack, site, part, scope, source in keys:
        place = {"stack": stack, "site": site, "part": part, "scope": scope, "source": source}
        values = course(reports, labels, metric, **place)
        if not any(values.values()):
            continue
        name = " · ".join((stack, *_place(site, part), *((source,) if several else ())))
        drawn = {
            "figure": lines(values, labels, metric, scope=scope),
            "sheet": sheet(values, labels, metric, scope=scope),
        }
        figures.append({"metric": metric, "place": name, "scope": scope, **drawn})
        scopes.setdefault(metric, set()).add(scope)
    first = next((metric for metric in _FIRST if metric in scopes), figures[0]["metric"] if figures else None)
    return {"figures": figures, "first": first, "headline": {m: headline(found) for m, found in scopes.items()}}


def _place(site: str, part: str) -> tuple[str, ...]:
    match site, part:
        case "stream", "out":
            return ("block output",)
        case "stream", "mid":
            return ("between attention and MLP",)
        case "read", _:
            return ("read by attention" if part == "out" else "read by the MLP",)
        case "attention", _:
            return (f"{part} attention, mean over heads",)
    return (site, part)
