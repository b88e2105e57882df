"""The report: rows, what they are of, and the ways to look at them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.report import document
from fullrank.report.context import by_context
from fullrank.report.figure import as_figure, draw
from fullrank.report.prediction import Prediction
from fullrank.report.ratios import ratio_frame
from fullrank.report.scree import scree
from fullrank.report.series import Series, series_of
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.verdict import Diagnosis, Verdict
from fullrank.table import Slope, Table, write_atomically
from fullrank.table.slopes import slope_frame

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

    from fullrank.report.overlay import Overlay

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Everything measured or predicted of one model, in one schema.

    Attributes:
        rows: one row per number.
        about: what was examined, on what and how: model, architecture, parameters, fresh, stacks, input, dtype, device,
            seed, gradients, notes, versions, created, seconds; JSON's own types, every key optional. `nulls` may hold,
            by stack and metric, what isotropic Gaussian tokens of that shape give.
        spectra: singular values of attention maps, for the heads where they were kept.
        context_slopes: how each number changes with the context, where several contexts were read; see `slopes`.
        reference: the same numbers of the same architecture at its own random initialisation, on the same batch; None
            where none was drawn.
        diagnosis: which failures were found, which are not there, which could not be looked for; None where nobody
            looked.
        prediction: of a predicted report, which theories speak, how well they fit, and answers; None of a measured one.
    """

    rows: Table
    about: Mapping[str, Any] = field(default_factory=dict)
    spectra: tuple[HeadSpectrum, ...] = ()
    context_slopes: tuple[Slope, ...] = ()
    reference: Report | None = None
    diagnosis: Diagnosis | None = None
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "about", document.plain(self.about))
        object.__setattr__(self, "spectra", tuple(self.spectra))
        object.__setattr__(self, "context_slopes", tuple(self.context_slopes))

    def __repr__(self) -> str:
        return f"Report({self.about.get('model') or 'unnamed'!r}, {len(self.rows)} rows, {len(self.spectra)} spectra)"

    # ---------------------------------------------------------------- numbers

    @property
    def table(self) -> pandas.DataFrame:
        """One row per number, the schema's twelve columns."""
        return self.rows.frame

    @property
    def notes(self) -> pandas.DataFrame:
        """The rows that carry a note: why a value is missing, what to know when reading it."""
        return self.rows.notes

    @property
    def slopes(self) -> pandas.DataFrame:
        """One line per number that was read at several contexts: its change per doubling and its exponent.

        `per_doubling` is in the value's own unit, `exponent` is d log value / d log context; both are means over
        sequences of each sequence's own slope, with standard errors and 95 % intervals.
        """
        return slope_frame(self.context_slopes)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Named failures with their evidence, gravest first; what was clear or not checked is in `diagnosis`."""
        return () if self.diagnosis is None else self.diagnosis.verdicts

    @property
    def ratios(self) -> pandas.DataFrame:
        """Every number beside its references: `initialisation`, `null`, and its ratio to each; NA where there is none.

        The null is of Gaussian tokens of the same shape, for metrics of the stream at their headline scope.
        """
        return ratio_frame(self)

    @property
    def primary(self) -> str | None:
        """Of a predicted report, the source whose theory's assumptions hold best: `theory:<key>`."""
        key = None if self.prediction is None else self.prediction.primary
        return None if key is None else f"theory:{key}"

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
        """Layers × heads of a metric that heads have, layers × places of another; see `Table.pivot`."""
        return self.rows.pivot(metric, scope=scope, stack=stack, site=site, part=part, source=source)

    # ---------------------------------------------------------------- pictures

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
        """A heat map over layers × heads of a metric that heads have, a profile over depth of another.

        Args:
            metric: a metric in this report.
            scope: which scope; by default the headline (`late` where the metric has it, else `all`).
            stack: only this stack.
            site: only this site.
            part: only this part.
            source: only this source.
            logarithmic: whether a profile's value axis is logarithmic.

        Returns:
            The figure, interactive in a notebook.

        Raises:
            TableError: where nothing is left to draw; it names what there is.
        """
        place = {"scope": scope, "stack": stack, "site": site, "part": part, "source": source}
        return as_figure(draw(self._series(), metric, logarithmic=logarithmic, **place))

    def context_figure(
        self,
        metric: str,
        *,
        scope: str | None = None,
        stack: str | None = None,
        site: str | None = None,
        part: str | None = None,
    ) -> Figure:
        """A metric against the context, one line per layer, where several contexts were read.

        Args:
            metric: a metric in this report.
            scope: over which tokens, without the context; by default the headline.
            stack: needed where several stacks have it.
            site: only this site.
            part: needed where a block has several attentions.

        Returns:
            The figure; of a metric that heads have, means over heads.

        Raises:
            TableError: where the report has no contexts, or several places are meant.
        """
        return as_figure(by_context(self._series(), metric, scope=scope, stack=stack, site=site, part=part))

    def scree(
        self, layer: int, head: int, *, stack: str | None = None, part: str | None = None, logarithmic: bool = False
    ) -> Figure:
        """The singular values of one head's attention map, with the bulk that random rows would give.

        Args:
            layer: from 1.
            head: from 0.
            stack: needed where several stacks have that layer and head.
            part: needed where a block has several attentions.
            logarithmic: whether the axis of singular values is logarithmic.

        Returns:
            The figure.

        Raises:
            TableError: where that spectrum was not kept.
        """
        return as_figure(scree(self._series(), layer, head, stack=stack, part=part, logarithmic=logarithmic))

    def overlay(self, other: Report, *, labels: Sequence[str] | None = None) -> Overlay:
        """This report and another in the same figures.

        Args:
            other: measured or predicted.
            labels: two names; by default what tells the reports apart.

        Returns:
            An overlay, with `.figure(metric)` and `.save_html(path)`.
        """
        from fullrank.report.overlay import Overlay

        return Overlay.of((self, other), labels=labels)

    def _series(self) -> tuple[Series, ...]:
        return series_of((self,), ("",))

    # ---------------------------------------------------------------- files

    def to_json(self) -> str:
        """The whole report as one JSON document with a schema version."""
        return document.dumps(document.content(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report in what `to_json` gave.

        Returns:
            An equal report.

        Raises:
            TableError: for text that is no report, or of another schema version.
        """
        return cls.from_content(document.loads(text))

    @classmethod
    def from_content(cls, content: Any) -> Report:
        """The report in a document in JSON's own types.

        Returns:
            An equal report.

        Raises:
            TableError: for what is no report, or of another schema version.
        """
        parts = document.parsed(content)
        reference = parts.pop("reference")
        return cls(**parts, reference=None if reference is None else cls(**reference))

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json()` to a file, whole or not at all."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save_json` wrote."""
        return cls.from_json(document.text_of(path))

    def to_html(self) -> str:
        """The page: one self-contained document that asks nothing of the network."""
        from fullrank.report.page import page

        return page((self,), ("",))

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    # ---------------------------------------------------------------- display

    def _repr_html_(self) -> str:
        from fullrank.report.page import summary

        return summary((self,), ("",))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from fullrank.report.terminal import render

        yield from render((self,), ("",), width=options.max_width, ascii_only=options.ascii_only)

    def print(self, *, page_written: bool = False) -> None:
        """Show the report on the terminal.

        Args:
            page_written: whether its page has been written already, so that nobody need be told how.
        """
        from rich.console import Console, Group

        from fullrank.report.terminal import render

        console = Console()
        ascii_only = console.options.ascii_only
        lines = render((self,), ("",), width=console.width, ascii_only=ascii_only, page_written=page_written)
        console.print(Group(*lines))
