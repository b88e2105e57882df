"""What a figure draws together: the numbers of one source in one report, under one label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullrank.errors import TableError
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.style import COLOURS, MUTED, shade
from fullrank.table import Row, Slope, headline

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["Series", "default_labels", "select", "series_colour", "series_of"]


@dataclass(frozen=True)
class Series:
    """Rows of one source, with what is drawn beside them.

    Attributes:
        label: empty where nothing else is drawn.
        rows: all of one `source`.
        spectra: of the report the rows are from.
        causal: names of the stacks whose attention is causal.
        nulls: value of a metric on isotropic Gaussian tokens, by (stack, metric).
        slopes: over contexts, of the report the rows are from.
    """

    label: str
    rows: tuple[Row, ...]
    spectra: tuple[HeadSpectrum, ...] = ()
    causal: frozenset[str] = frozenset()
    nulls: tuple[tuple[str, str, float], ...] = ()
    slopes: tuple[Slope, ...] = ()

    @property
    def predicted(self) -> bool:
        """Whether the rows are a theory's: figures draw them dotted."""
        return bool(self.rows) and self.rows[0].source.startswith("theory:")

    def null(self, stack: str, metric: str) -> float | None:
        """What isotropic Gaussian tokens give, where the report says so."""
        return next((value for s, m, value in self.nulls if (s, m) == (stack, metric)), None)


def series_of(reports: Sequence[Report], labels: Sequence[str]) -> tuple[Series, ...]:
    """One series per report and source; a report's several sources are told apart by name."""
    series = []
    for report, label in zip(reports, labels, strict=True):
        by_source: dict[str, list[Row]] = {}
        for row in report.rows:
            by_source.setdefault(row.source, []).append(row)
        stacks = [stack for stack in report.about.get("stacks") or [] if isinstance(stack, dict)]
        causal = frozenset(str(stack.get("name")) for stack in stacks if stack.get("causal"))
        nulls = tuple(
            (stack, metric, float(value))
            for stack, values in (report.about.get("nulls") or {}).items()
            for metric, value in values.items()
        )
        for source, rows in (by_source or {"measured": []}).items():
            name = " · ".join(part for part in (label, source if len(by_source) > 1 else "") if part)
            own = source == "measured" or len(by_source) == 1
            spectra, slopes = (report.spectra, report.context_slopes) if own else ((), ())
            series.append(Series(name, tuple(rows), spectra, causal, nulls, slopes))
    return tuple(series)


def series_colour(series: Sequence[Series], index: int) -> str:
    """Measured series first, in the palette's order or, where they are too many, in shades; then theories.

    Args:
        series: what is drawn together; theories in the order of their standing.
        index: of one of them.

    Returns:
        The colour; grey for theories that the palette does not reach.
    """
    measured = [place for place, one in enumerate(series) if not one.predicted]
    if index in measured:
        if len(measured) > len(COLOURS):
            return shade(measured.index(index), range(len(measured)))
        return COLOURS[measured.index(index)]
    taken = min(len(measured), len(COLOURS)) + sum(one.predicted for one in series[:index])
    return COLOURS[taken] if taken < len(COLOURS) else MUTED


def default_labels(reports: Sequence[Report]) -> tuple[str, ...]:
    """What tells reports apart: the models' names, else their sources, else their place, from 1."""
    names = [str(report.about.get("model") or "") for report in reports]
    sources = [", ".join(dict.fromkeys(row.source for row in report.rows)) for report in reports]
    for labels in (names, sources, [f"{n} · {s}" for n, s in zip(names, sources, strict=True)]):
        if len(set(labels)) == len(labels) and all(labels):
            return tuple(labels)
    return tuple(f"{name or 'report'} ({index})" for index, name in enumerate(names, start=1))


def select(
    rows: Iterable[Row],
    metric: str,
    *,
    scope: str | None = None,
    stack: str | None = None,
    site: str | None = None,
    part: str | None = None,
    source: str | None = None,
) -> list[Row]:
    """The rows of a metric at one scope (by default the headline one of every place) and, where asked, at one place.

    Returns:
        At least one row.

    Raises:
        TableError: where there is none, naming what there is.
    """
    rows = list(rows)
    of_metric = [row for row in rows if row.metric == metric]
    if not of_metric:
        have = ", ".join(sorted({row.metric for row in rows})) or "no rows"
        raise TableError(f"metric={metric!r} is not in this report; it has {have}.")
    asked = {"stack": stack, "site": site, "part": part, "source": source}
    asked = {name: wanted for name, wanted in asked.items() if wanted is not None}
    left = [row for row in of_metric if all(getattr(row, name) == wanted for name, wanted in asked.items())]
    scopes: dict[tuple[str, str, str], set[str]] = {}
    for row in left:
        scopes.setdefault((row.stack, row.site, row.part), set()).add(row.scope)
    chosen = {place: scope or headline(found) for place, found in scopes.items()}
    left = [row for row in left if row.scope == chosen[row.stack, row.site, row.part]]
    if not left:
        places = sorted({(row.stack, row.site, row.part, row.scope) for row in of_metric})
        found = "; ".join(" ".join(place) for place in places[:12])
        wanted_text = ", ".join(
            f"{name}={value!r}" for name, value in (asked | ({"scope": scope} if scope else {})).items()
        )
        raise TableError(f"no rows of {metric!r} with {wanted_text}; there are (stack site part scope): {found}.")
    return left
