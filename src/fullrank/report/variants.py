"""Several variants of a model (checkpoints of a run, revisions, sizes) as one report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fullrank.errors import TableError
from fullrank.report import document
from fullrank.report.changes import Change, largest_changes
from fullrank.report.figure import as_figure, draw
from fullrank.report.overlay import Overlay
from fullrank.report.report import Report
from fullrank.report.series import series_of
from fullrank.report.style import COLOURS
from fullrank.report.variation import course, lines, sheet
from fullrank.table import COLUMNS, SCHEMA_VERSION, write_atomically

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["Failure", "Variants", "View"]

View = Literal["depth", "sheet", "lines"]
"""`depth`: every variant over layers; `sheet`: variants × layers; `lines`: against the variants, a line per layer."""


class Failure(NamedTuple):
    """A variant that could not be examined: its label and the reason."""

    label: str
    reason: str


@dataclass(frozen=True)
class Variants:
    """Reports on variants of one model, in the order in which they are read: of checkpoints, training's.

    Attributes:
        reports: of the variants that could be examined.
        labels: one name each, all different.
        failed: the variants that could not.
        notes: what to know when comparing, such as tokenizers that differ.
    """

    reports: tuple[Report, ...]
    labels: tuple[str, ...]
    failed: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        reports: Sequence[Report],
        labels: Sequence[str] | None = None,
        *,
        failed: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ) -> Variants:
        """Variants under names that tell them apart.

        Args:
            reports: at least one.
            labels: their names; by default what tells the reports apart.
            failed: label and reason of those without a report.
            notes: sentences for the reader.

        Returns:
            The variants.

        Raises:
            TableError: without a report, or for labels that are not one different name per report.
        """
        if not reports:
            raise TableError("reports is empty: there is no variant to show.")
        overlay = Overlay.of(reports, labels=labels)
        return cls(overlay.reports, overlay.labels, tuple(Failure(*one) for one in failed), tuple(notes))

    def __repr__(self) -> str:
        said = f", {len(self.failed)} failed" if self.failed else ""
        return f"Variants({', '.join(self.labels)}{said})"

    def __len__(self) -> int:
        return len(self.reports)

    def __getitem__(self, label: str) -> Report:
        if label not in self.labels:
            raise TableError(f"variant={label!r} is not one of {', '.join(self.labels)}.")
        return self.reports[self.labels.index(label)]

    # ---------------------------------------------------------------- numbers

    @property
    def table(self) -> pandas.DataFrame:
        """The rows of every report, the column `variant` before the schema's twelve."""
        import pandas as pd

        frames = [report.table.assign(variant=label) for report, label in zip(self.reports, self.labels, strict=True)]
        return pd.concat(frames, ignore_index=True)[["variant", *COLUMNS]]

    def pivot(
        self,
        metric: str,
        *,
        scope: str | None = None,
        stack: str | None = None,
        site: str | None = None,
        part: str | None = None,
        source: str | None = None,
    ) -> pandas.DataFrame:
        """Variants × layers of a metric; its mean over heads where heads have it.

        Args:
            metric: a metric that at least one variant has.
            scope: which scope; by default the headline of those that all variants have.
            stack: only this stack; needed where several have the metric.
            site: only this site; by default the stream or the attention.
            part: only this part; by default the block output or the first attention.
            source: only this source.

        Returns:
            A frame indexed by variant, in order, a column per layer.

        Raises:
            TableError: where nothing is left, or several stacks or scopes would be mixed.
        """
        import pandas as pd

        place = {"scope": scope, "stack": stack, "site": site, "part": part, "source": source}
        _, values = course(self.reports, self.labels, metric, **place)
        layers = sorted({layer for of_variant in values.values() for layer in of_variant})
        cells = [[values.get(label, {}).get(layer, (None, None))[0] for layer in layers] for label in self.labels]
        index = pd.Index(self.labels, name="variant")
        return pd.DataFrame(cells, index=index, columns=pd.Index(layers, name="layer"), dtype="Float64")

    def changes(self, *, most: int = 8) -> list[Change]:
        """What changed most from the first variant to the last; see `fullrank.report.changes`."""
        return largest_changes(self.reports[0], self.reports[-1], most=most) if len(self) > 1 else []

    # ---------------------------------------------------------------- pictures

    def figure(
        self,
        metric: str,
        *,
        view: View | None = None,
        scope: str | None = None,
        stack: str | None = None,
        site: str | None = None,
        part: str | None = None,
        source: str | None = None,
        logarithmic: bool = False,
    ) -> Figure:
        """A metric of every variant.

        Args:
            metric: a metric that at least one variant has.
            view: `depth` over layers, `sheet` variants × layers, `lines` against the variants with a line per layer; by
                default `depth` for up to six variants, else `sheet`.
            scope: which scope; by default the headline; against the variants, that of the scopes that all have.
            stack: only this stack.
            site: only this site.
            part: only this part.
            source: only this source.
            logarithmic: whether the value axis is logarithmic.

        Returns:
            The figure.

        Raises:
            TableError: where there is nothing to draw, or for a view that is none.
        """
        place = {"scope": scope, "stack": stack, "site": site, "part": part, "source": source}
        view = view or ("depth" if len(self) <= len(COLOURS) else "sheet")  # as many as colours tell apart
        if view == "depth":
            return as_figure(draw(series_of(self.reports, self.labels), metric, logarithmic=logarithmic, **place))
        if view not in ("sheet", "lines"):
            raise TableError(f"view={view!r} is not one of depth, sheet, lines.")
        said, values = course(self.reports, self.labels, metric, **place)
        if view == "sheet":
            return as_figure(sheet(values, self.labels, metric, scope=said))
        return as_figure(lines(values, self.labels, metric, scope=said, logarithmic=logarithmic))

    # ---------------------------------------------------------------- files

    def to_json(self) -> str:
        """One JSON document, `{"schema": 1, "variants": [{"variant": …, "report": {…}}], "failed": […], "notes": […]}`.

        Returns:
            The text; the reports in it are what `Report.to_json` writes.
        """
        pairs = zip(self.labels, self.reports, strict=True)
        content = {
            "schema": SCHEMA_VERSION,
            "variants": [{"variant": label, "report": document.content(report)} for label, report in pairs],
            "failed": [one._asdict() for one in self.failed],
            "notes": list(self.notes),
        }
        return document.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Variants:
        """The variants in what `to_json` gave.

        Returns:
            Equal variants.

        Raises:
            TableError: for text that holds no variants, or of another schema version.
        """
        content = document.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("variants"), list):
            raise TableError(
                "these are no fullrank variants: there is no list 'variants'; one report is read by Report."
            )
        if content.get("schema") != SCHEMA_VERSION:
            found = content.get("schema")
            raise TableError(f"schema version {found!r} found; this fullrank reads {SCHEMA_VERSION}.")
        pairs = [_fields(one, "variant", "report") for one in content["variants"]]
        failed = [_fields(one, "label", "reason") for one in content.get("failed", [])]
        return cls.of(
            [Report.from_content(report) for _, report in pairs],
            [str(label) for label, _ in pairs],
            failed=[(str(label), str(reason)) for label, reason in failed],
            notes=[str(note) for note in content.get("notes", [])],
        )

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json()` to a file, whole or not at all."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Variants:
        """Read what `save_json` wrote."""
        return cls.from_json(document.text_of(path))

    def to_html(self) -> str:
        """The page of all variants together, with what changed, and every metric against the variants."""
        from fullrank.report.page import page

        return page(self.reports, self.labels, variants=self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    # ---------------------------------------------------------------- display

    def _repr_html_(self) -> str:
        from fullrank.report.page import summary

        return summary(self.reports, self.labels)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from fullrank.report.terminal_variants import render

        yield from render(self, width=options.max_width, ascii_only=options.ascii_only)

    def print(self, *, page_written: bool = False) -> None:
        """Show the variants on the terminal.

        Args:
            page_written: whether their page has been written already, so that nobody need be told how.
        """
        from rich.console import Console, Group

        from fullrank.report.terminal_variants import render

        console = Console()
        ascii_only = console.options.ascii_only
        console.print(Group(*render(self, width=console.width, ascii_only=ascii_only, page_written=page_written)))


def _fields(record: Any, first: str, second: str) -> tuple[Any, Any]:
    """Two entries of a record of a file, refused where it has them not."""
    if not isinstance(record, dict) or not {first, second} <= record.keys():
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise TableError(f"a record of the variants has {found}; expected {first} and {second}.")
    return record[first], record[second]
