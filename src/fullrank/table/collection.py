"""All the numbers of an examination: selecting, pooling, pivoting, and the formats they are kept in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fullrank.errors import TableError
from fullrank.table import files
from fullrank.table.pooling import pool
from fullrank.table.rows import COLUMNS, FIELDS, KEY, Row, headline

if TYPE_CHECKING:
    import pandas

__all__ = ["Table"]


class Table:
    """An ordered collection of rows with at most one row per key."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows: tuple[Row, ...] = tuple(rows)
        seen: set[tuple[Any, ...]] = set()
        for row in self.rows:
            if row.key in seen:
                raise TableError(f"two rows for the same number: {dict(zip(KEY, row.key, strict=True))}.")
            seen.add(row.key)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} rows, {len({row.metric for row in self.rows})} metrics)"

    def where(self, **equal: Any) -> Table:
        """The rows in which each named column equals the given value.

        Args:
            **equal: column names (or `note`) and the values asked for.

        Returns:
            A new table, rows in the same order.

        Raises:
            TableError: for a name that is no column.
        """
        unknown = set(equal) - set(FIELDS)
        if unknown:
            raise TableError(f"{sorted(unknown)} are no columns; the columns are {', '.join(COLUMNS)}.")
        return Table(row for row in self.rows if all(getattr(row, name) == equal[name] for name in equal))

    def map(self, change: Callable[[Row], Row]) -> Table:
        """The table of `change(row)` for every row."""
        return Table(change(row) for row in self.rows)

    def with_source(self, source: str) -> Table:
        """The same numbers under another `source`."""
        return self.map(lambda row: replace(row, source=source))

    def merge(self, *others: Table) -> Table:
        """Pool tables of different sequences: mean and standard error of the union of their samples.

        Rows of one key are combined from (mean, standard error, n) as if all sequences had been measured together;
        a key that only some tables have is kept. The standard error is None where a row of several sequences has none.
        Numbers that belong to a whole batch (energy shares, `similarity_across`, `similarity_standardized`, everything
        over `samples`) are not determined by those of its parts: they become means weighted by n, marked
        `exact=False`, with a note. Positions (`sink_position`, `max_abs_position`) are kept where the tables agree
        and are else missing; of `max_abs` the largest is kept.

        Args:
            *others: tables to pool with this one.

        Returns:
            A new table, keys in order of first appearance.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for table in (self, *others):
            for row in table.rows:
                groups.setdefault(row.key, []).append(row)
        return Table(pool(group) for group in groups.values())

    # ---------------------------------------------------------------- pandas

    @property
    def frame(self) -> pandas.DataFrame:
        """The twelve columns as a pandas DataFrame with nullable types (`layer`, `head`, `n` are Int64)."""
        import pandas as pd

        columns: dict[str, Any] = {}
        for name in COLUMNS:
            values = [getattr(row, name) for row in self.rows]
            dtype = {"layer": "Int64", "head": "Int64", "n": "Int64", "exact": "bool"}.get(name)
            dtype = dtype or ("Float64" if name in ("value", "stderr") else "str")
            columns[name] = pd.array(values, dtype=dtype)  # type: ignore[call-overload]
        return pd.DataFrame(columns)

    @property
    def notes(self) -> pandas.DataFrame:
        """The rows that carry a note (why a value is missing, what to know), with the note as a 13th column."""
        noted = Table(row for row in self.rows if row.note)
        return noted.frame.assign(note=[row.note for row in noted.rows])

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
        """Layers × heads of a metric that heads have; layers × places of one that they do not.

        Args:
            metric: a metric in this table.
            scope: which scope; by default the headline (`late` where the metric has it, else `all`).
            stack: only this stack; needed where several have the metric.
            site: only this site.
            part: only this part.
            source: only this source.

        Returns:
            A frame indexed by layer.

        Raises:
            TableError: where no row is left, or several stacks, sources or sites would be mixed.
        """
        rows = [row for row in self.rows if row.metric == metric]
        if not rows:
            have = sorted({row.metric for row in self.rows})
            raise TableError(f"metric={metric!r} is not in this table; it has {', '.join(have) or 'no rows'}.")
        asked = {"stack": stack, "site": site, "part": part, "source": source}
        for name, wanted in asked.items():
            if wanted is not None:
                rows = [row for row in rows if getattr(row, name) == wanted]
        scopes = {row.scope for row in rows}
        scope = scope or headline(scopes)
        rows = [row for row in rows if row.scope == scope]
        if not rows:
            raise TableError(f"no rows of {metric!r} with {asked | {'scope': scope}}; scopes: {sorted(scopes)}.")
        for name in ("source", "stack", "site"):
            found = sorted({getattr(row, name) for row in rows})
            if len(found) > 1:
                raise TableError(f"{metric!r} stands for several values of {name}: {found}; pass {name}=.")
        parts = sorted({row.part for row in rows})
        with_heads = any(row.head is not None for row in rows)
        if with_heads and len(parts) > 1:
            raise TableError(f"{metric!r} stands for several values of part: {parts}; pass part=.")
        column = "head" if with_heads else "part"
        return Table(rows).frame.pivot(index="layer", columns=column, values="value")

    # ---------------------------------------------------------------- files

    def to_records(self) -> list[dict[str, Any]]:
        """JSON-ready rows, the note included where there is one."""
        return files.to_records(self.rows)

    @classmethod
    def from_records(cls, records: Sequence[dict[str, Any]]) -> Table:
        """Rows from what `to_records` gave.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for a record with missing or unknown columns.
        """
        return cls(files.from_records(records))

    def to_json(self) -> str:
        """`{"schema": 1, "rows": […]}`."""
        return files.to_json(self.rows)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table in what `to_json` gave.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for text that is not such JSON, or of another schema version.
        """
        return cls(files.from_json(text))

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the columns and the note as Parquet (needs the `store` extra), with the schema version in its metadata.

        Raises:
            OutputError: where pyarrow is missing or the path cannot be written.
        """
        files.to_parquet(self.frame.assign(note=[row.note for row in self.rows]), path)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> Table:
        """Read what `to_parquet` wrote.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for a file without this schema.
        """
        return cls(files.from_parquet(path))
