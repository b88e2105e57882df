"""Two reports in the same figures: before and after, measured and predicted, one model and another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fullrank.errors import TableError
from fullrank.report.figure import as_figure, draw
from fullrank.report.scree import scree
from fullrank.report.series import Series, default_labels, series_of
from fullrank.table import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

    from fullrank.report.report import Report

__all__ = ["Overlay"]


@dataclass(frozen=True)
class Overlay:
    """Reports that are looked at together.

    Attributes:
        reports: in the order in which they are drawn.
        labels: one name each, all different.
    """

    reports: tuple[Report, ...]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, reports: Sequence[Report], *, labels: Sequence[str] | None = None) -> Overlay:
        """An overlay with names that tell the reports apart.

        Args:
            reports: two of them.
            labels: their names; by default the models' names, else their sources, else numbers.

        Returns:
            The overlay.

        Raises:
            TableError: for labels that are not one different name per report.
        """
        names = tuple(default_labels(reports) if labels is None else map(str, labels))
        if len(names) != len(reports) or len(set(names)) != len(names) or not all(names):
            raise TableError(f"labels={list(names)} must be {len(reports)} different names, one per report.")
        return cls(tuple(reports), names)

    def figure(
        self,
        metric: str,
        *,
        scope: str | None = None,
        stack: str | None = None,
        site: str | None = None,
        part: str | None = None,
        source: str | None = None,
        logarithmic: bool = False,
    ) -> Figure:
        """As `Report.figure`, with every report: profiles by colour, heads side by side with their difference.

        Args:
            metric: a metric that at least one report has.
            scope: which scope; by default each report's headline.
            stack: only this stack.
            site: only this site.
            part: only this part.
            source: only this source.
            logarithmic: whether a profile's value axis is logarithmic.

        Returns:
            The figure.
        """
        place = {"scope": scope, "stack": stack, "site": site, "part": part, "source": source}
        return as_figure(draw(self._series(), metric, logarithmic=logarithmic, **place))

    def scree(
        self, layer: int, head: int, *, stack: str | None = None, part: str | None = None, logarithmic: bool = False
    ) -> Figure:
        """As `Report.scree`, with the spectra of every report that kept them."""
        return as_figure(scree(self._series(), layer, head, stack=stack, part=part, logarithmic=logarithmic))

    def to_html(self) -> str:
        """The page of `Report.to_html` for all reports together."""
        from fullrank.report.page import page

        return page(self.reports, self.labels)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    def _repr_html_(self) -> str:
        from fullrank.report.page import summary

        return summary(self.reports, self.labels)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from fullrank.report.terminal import render

        yield from render(self.reports, self.labels, width=options.max_width, ascii_only=options.ascii_only)

    def _series(self) -> tuple[Series, ...]:
        return series_of(self.reports, self.labels)
