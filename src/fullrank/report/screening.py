"""The result of trying several remedies on one model: ranked by loss where they were trained, else grouped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.errors import TableError
from fullrank.report import document
from fullrank.report.figure import as_figure
from fullrank.report.report import Report
from fullrank.report.screened import AS_IT_IS, GROUPS, Group, Screened
from fullrank.table import SCHEMA_VERSION, write_atomically

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["Screening"]


@dataclass(frozen=True)
class Screening:
    """Variants of one model, and what became of each.

    Attributes:
        rows: of the model as it is and of every candidate, in any order.
        steps: of each training; 0 where nothing was trained.
        about: of what and how: model, task, chance (the loss of who knows nothing), seeds, seconds; JSON's own types.
        profiles: reports by variant, where they were kept; that of the model as it is may hold its reference.
        notes: sentences for the reader.
    """

    rows: tuple[Screened, ...]
    steps: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Report] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rows: Sequence[Screened],
        *,
        steps: int = 0,
        about: Mapping[str, Any] | None = None,
        profiles: Mapping[str, Report] | None = None,
        notes: Sequence[str] = (),
    ) -> Screening:
        """A screening of plain data.

        Args:
            rows: the model as it is, once, and the candidates.
            steps: of each training; 0 where nothing was trained.
            about: of what and how.
            profiles: reports by variant.
            notes: sentences for the reader.

        Returns:
            The screening, its rows in the order in which they are read.

        Raises:
            TableError: for variants of one name, for more or less than one model as it is, for a profile of no variant,
                or for losses without training.
        """
        names = [row.variant for row in rows]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise TableError(f"variant {twice!r} stands in the screening more than once.")
        if sum(row.kind == AS_IT_IS for row in rows) != 1:
            raise TableError("a screening holds the model as it is exactly once.")
        strange = sorted(set(profiles or {}) - set(names))
        if strange:
            raise TableError(f"there is a profile of {strange[0]!r}, which is no variant of this screening.")
        if steps < 0 or (not steps and any(row.loss is not None for row in rows)):
            raise TableError(f"steps={steps}, and there are losses: losses are of trained variants only.")
        ordered = _ranked(rows) if steps else _grouped(rows)
        plain = document.plain(about or {})
        return cls(tuple(ordered), steps, plain, dict(profiles or {}), tuple(notes))

    def __repr__(self) -> str:
        return f"Screening({', '.join(row.variant for row in self.rows)}; {self.steps} steps)"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, variant: str) -> Screened:
        for row in self.rows:
            if row.variant == variant:
                return row
        raise TableError(f"variant={variant!r} is not one of {', '.join(row.variant for row in self.rows)}.")

    # ---------------------------------------------------------------- what it says

    @property
    def ranked(self) -> bool:
        """Whether rows are ranked: by the loss after training and by nothing else."""
        return self.steps > 0

    @property
    def as_it_is(self) -> Screened:
        """The model without any remedy."""
        return next(row for row in self.rows if row.kind == AS_IT_IS)

    @property
    def candidates(self) -> tuple[Screened, ...]:
        """All others."""
        return tuple(row for row in self.rows if row.kind != AS_IT_IS)

    @property
    def seeds(self) -> int:
        """How many trainings of each there were; 1 where that is not known, 0 without training."""
        known = self.about.get("seeds")
        said = [len(known) if isinstance(known, list) else known] if isinstance(known, int | list) else []
        found = [row.change.seeds for row in self.rows if row.change is not None]
        return max([1, *found, *said]) if self.ranked else 0

    @property
    def losing_less(self) -> tuple[Screened, ...]:
        """Candidates whose interval lies below 0, or that train where the model as it is diverged.

        Of one seed the interval covers held-out sequences alone: another training may end otherwise.
        """
        if not self.ranked:
            return ()
        lost = self.as_it_is.loss is not None and math.isinf(self.as_it_is.loss)
        return tuple(
            row
            for row in self.candidates
            if (row.change is not None and row.change.shown and row.change.mean < 0) or (lost and bool(row.trained))
        )

    @property
    def helping(self) -> tuple[Screened, ...]:
        """Of `losing_less` those that several trainings show to help; none where there was one of each."""
        return self.losing_less if self.seeds > 1 else ()

    def rank(self, row: Screened) -> int | None:
        """Its place by loss, from 1; None where nothing was trained, or it was not or diverged."""
        if not self.ranked or row.loss is None or not math.isfinite(row.loss):
            return None
        return 1 + sum(other.loss is not None and other.loss < row.loss for other in self.rows)

    def groups(self) -> dict[Group, tuple[Screened, ...]]:
        """Candidates by what they restored, each group in the order in which they were tried."""
        found = {group: tuple(row for row in self.candidates if row.group == group) for group in GROUPS}
        return {group: rows for group, rows in found.items() if rows}

    @property
    def said(self) -> str:
        """What came out, in two or three sentences."""
        from fullrank.report.screening_words import said

        return said(self)

    # ---------------------------------------------------------------- numbers

    @property
    def table(self) -> pandas.DataFrame:
        """One line a variant, in order; `rank` is NA where nothing was trained."""
        from fullrank.report.screening_tables import variants

        return variants(self)

    @property
    def restored(self) -> pandas.DataFrame:
        """One line for every number of every variant: before, after, reference, null, target and share of the way."""
        from fullrank.report.screening_tables import numbers

        return numbers(self)

    # ---------------------------------------------------------------- pictures and files

    def figure(self, metric: str | None = None) -> Figure:
        """The profile of a metric over depth, of every variant; without a metric the differences in loss."""
        from fullrank.report.screening_figure import differences, profiles

        return as_figure(differences(self) if metric is None else profiles(self, metric))

    def to_json(self) -> str:
        """One JSON document, with the reports of the profiles in it.

        What follows from the rest stands in it for other programs and is not read back: `said`, of every row `rank`,
        `group`, `share` and `idle`, of every number `target` and `share`.

        Returns:
            The text.
        """
        return document.dumps(
            {
                "schema": SCHEMA_VERSION,
                "steps": self.steps,
                "about": document.encoded(self.about),
                "said": self.said,
                "screened": [document.encoded(row.to_record() | {"rank": self.rank(row)}) for row in self.rows],
                "profiles": {name: document.content(report) for name, report in self.profiles.items()},
                "notes": list(self.notes),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Screening:
        """The screening in what `to_json` gave.

        Returns:
            An equal one.

        Raises:
            TableError: for text that holds none, or of another schema version.
        """
        found = document.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("screened"), list):
            raise TableError("this is no fullrank screening: there is no list 'screened'.")
        if found.get("schema") != SCHEMA_VERSION:
            raise TableError(f"schema version {found.get('schema')!r} found; this fullrank reads {SCHEMA_VERSION}.")
        kinds: list[tuple[str, type, Any]] = [("steps", int, 0), ("about", dict, {}), ("profiles", dict, {})]
        for name, kind, missing in [*kinds, ("notes", list, [])]:
            if not isinstance(found.setdefault(name, missing), kind):
                raise TableError(
                    f"{name} of the screening is of type {type(found[name]).__name__}, not {kind.__name__}."
                )
        try:
            rows = [Screened.from_record(document.decoded(one)) for one in found["screened"]]
        except (TypeError, AttributeError) as reason:
            raise TableError(f"a row of the screening cannot be read: {reason}.") from None
        return cls.of(
            rows,
            steps=found["steps"],
            about=document.decoded(found["about"]),
            profiles={name: Report.from_content(one) for name, one in found["profiles"].items()},
            notes=[str(note) for note in found["notes"]],
        )

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json()` to a file, whole or not at all."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Screening:
        """Read what `save_json` wrote."""
        return cls.from_json(document.text_of(path))

    def to_html(self) -> str:
        """A page that asks nothing of the network: what came out, the table, profiles before and after."""
        from fullrank.report.screening_page import screening_page

        return screening_page(self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    # ---------------------------------------------------------------- display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from fullrank.report.terminal_screening import render

        yield from render(self, width=options.max_width, ascii_only=options.ascii_only)

    def print(self, *, page_written: bool = False) -> None:
        """Show it on the terminal.

        Args:
            page_written: whether its page has been written already, so that nobody need be told how.
        """
        from rich.console import Console, Group

        from fullrank.report.terminal_screening import render

        console = Console()
        ascii_only = console.options.ascii_only
        console.print(Group(*render(self, width=console.width, ascii_only=ascii_only, page_written=page_written)))


def _ranked(rows: Sequence[Screened]) -> list[Screened]:
    """By loss and nothing else; then those that diverged, were not trained, or could not be applied."""

    def place(row: Screened) -> tuple[int, float]:
        if row.loss is None:
            return (3 if row.failed else 2), 0.0
        return (0, row.loss) if math.isfinite(row.loss) else (1, 0.0)

    return sorted(rows, key=place)


def _grouped(rows: Sequence[Screened]) -> list[Screened]:
    return sorted(rows, key=lambda row: GROUPS.index(row.group))
