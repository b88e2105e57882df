"""The table: one row per number, the same for everything measured and everything predicted.

The twelve columns are frozen. A number that could not be had is a row too: its `value` is NA and its `note` says
why. The note travels with the row (and through every file format) but is no column of the frame.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.errors import OutputError, TableError

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "SCHEMA_VERSION", "Row", "Table", "write_atomically"]

SCHEMA_VERSION = 1
COLUMNS = (
    "source",
    "stack",
    "layer",
    "site",
    "part",
    "head",
    "scope",
    "metric",
    "value",
    "stderr",
    "n",
    "exact",
)
_SITES = ("stream", "read", "attention", "mlp", "weights", "gradient")
_KEY = COLUMNS[:8]


@dataclass(frozen=True, slots=True)
class Row:
    """One number: where it was taken, over what, its value and how sure it is.

    Attributes:
        stack: `decoder`, `encoder`, `vision`, …
        layer: 0 before the first block, n after the n-th block call.
        site: `stream`, `read`, `attention`, `mlp`, `weights` or `gradient`.
        part: `out`, `mid`, `self`, `cross`, `self.1`, a weight's role, …
        metric: a name of `fullrank.metrics.VOCABULARY`.
        value: mean over sequences; None where it could not be had, and then `note` says why.
        head: None where the number does not belong to one head.
        scope: tokens joined by `+` in fixed order, such as `all`, `late`, `late+no-sink`.
        stderr: standard error of `value` over the `n` sequences; None where n = 1.
        n: how many sequences (or samples) entered.
        exact: False where rows, probes or iterations were sampled or capped.
        source: `measured`, `initialisation` or `theory:<card key>`.
        note: why the value is missing, or what to know when reading it.
    """

    stack: str
    layer: int
    site: str
    part: str
    metric: str
    value: float | None
    head: int | None = None
    scope: str = "all"
    stderr: float | None = None
    n: int | None = 1
    exact: bool = True
    source: str = "measured"
    note: str = ""

    def __post_init__(self) -> None:
        if self.site not in _SITES:
            raise TableError(f"site={self.site!r} is not one of {', '.join(_SITES)}.")
        if self.value is not None and math.isnan(self.value):
            object.__setattr__(self, "value", None)
        if self.stderr is not None and math.isnan(self.stderr):
            object.__setattr__(self, "stderr", None)
        if self.value is None and not self.note:
            raise TableError(f"a row of {self.metric!r} without a value must say why in its note.")

    @property
    def key(self) -> tuple[Any, ...]:
        """What the number is of: every column but value, stderr, n and exact."""
        return (
            self.source,
            self.stack,
            self.layer,
            self.site,
            self.part,
            self.head,
            self.scope,
            self.metric,
        )


_FIELDS = tuple(field.name for field in fields(Row))


class Table:
    """An ordered collection of rows with at most one row per key."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows: tuple[Row, ...] = tuple(rows)
        seen: set[tuple[Any, ...]] = set()
        for row in self.rows:
            if row.key in seen:
                raise TableError(f"two rows for the same number: {dict(zip(_KEY, row.key, strict=True))}.")
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
        unknown = set(equal) - set(_FIELDS)
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
        """Pool tables of different sequences: exact mean and standard error of the union of their samples.

        Rows of one key are combined from (mean, standard error, n) as if all sequences had been measured together;
        a key that only some tables have is kept. Right for numbers that are means over sequences; numbers that belong
        to a whole batch (energy shares, `similarity_across`) are pooled with the weights n and marked `exact=False`
        by their observers.

        Args:
            *others: tables to pool with this one.

        Returns:
            A new table, keys in order of first appearance.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for table in (self, *others):
            for row in table.rows:
                groups.setdefault(row.key, []).append(row)
        return Table(_pool(group) for group in groups.values())

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
        records = []
        for row in self.rows:
            record = asdict(row)
            record = {name: record[name] for name in (*COLUMNS, "note")}
            for name in ("value", "stderr"):
                if record[name] is not None and math.isinf(record[name]):
                    record[name] = "inf" if record[name] > 0 else "-inf"  # JSON has no infinity
            if not record["note"]:
                del record["note"]
            records.append(record)
        return records

    @classmethod
    def from_records(cls, records: Sequence[dict[str, Any]]) -> Table:
        """Rows from what `to_records` gave.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for a record with missing or unknown columns.
        """
        rows = []
        for record in records:
            if not set(COLUMNS) <= set(record) <= {*COLUMNS, "note"}:
                raise TableError(f"a row has the columns {sorted(record)}; expected {', '.join(COLUMNS)}.")
            values = {
                name: float(record[name]) if isinstance(record[name], str) else record[name]
                for name in ("value", "stderr")
            }
            rows.append(Row(**{**record, **values}))
        return cls(rows)

    def to_json(self) -> str:
        """`{"schema": 1, "rows": […]}`."""
        return json.dumps({"schema": SCHEMA_VERSION, "rows": self.to_records()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table in what `to_json` gave.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for text that is not such JSON, or of another schema version.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise TableError(f"this is not JSON: {error}.") from None
        check_schema(document)
        return cls.from_records(document["rows"])

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the columns and the note as Parquet (needs the `store` extra), with the schema version in its metadata.

        Raises:
            OutputError: where pyarrow is missing or the path cannot be written.
        """
        pyarrow, parquet = _pyarrow()
        frame = self.frame.assign(note=[row.note for row in self.rows])
        arrow = pyarrow.Table.from_pandas(frame, preserve_index=False)
        arrow = arrow.replace_schema_metadata({"fullrank.schema": str(SCHEMA_VERSION)})
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(arrow, sink)
        write_atomically(path, sink.getvalue().to_pybytes())

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> Table:
        """Read what `to_parquet` wrote.

        Returns:
            The table, rows in the same order.

        Raises:
            TableError: for a file without this schema.
        """
        _, parquet = _pyarrow()
        try:
            arrow = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise TableError(f"{path} cannot be read as Parquet: {error}.") from None
        version = (arrow.schema.metadata or {}).get(b"fullrank.schema", b"").decode()
        check_schema({"schema": int(version) if version.isdigit() else None, "rows": []})
        return cls(Row(**record) for record in arrow.to_pylist())


def headline(scopes: Iterable[str]) -> str:
    """The scope a number is read at first: `late` where it was taken (causal attention), else `all`."""
    scopes = set(scopes)
    for scope in ("late", "all"):
        if scope in scopes:
            return scope
    return sorted(scopes)[0] if scopes else "all"


def check_schema(document: Any) -> None:
    """Refuse a document that is not of this schema version.

    Raises:
        TableError: saying which version was found and which is read here.
    """
    if not isinstance(document, dict) or "rows" not in document or "schema" not in document:
        raise TableError("this is not a fullrank table: it has no 'schema' and 'rows'.")
    if document["schema"] != SCHEMA_VERSION:
        raise TableError(f"schema version {document['schema']!r} found; this fullrank reads {SCHEMA_VERSION}.")


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its destination and move it there, so that no half-written file is ever seen.

    Returns:
        The path written.

    Raises:
        OutputError: where the directory is missing or cannot be written.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if target.is_dir():
            raise OutputError(f"{target} cannot be written: it is a directory.")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from None
    return target


def _pool(group: list[Row]) -> Row:
    first = group[0]
    if len(group) == 1:
        return first
    known = [row for row in group if row.value is not None]
    note = "; ".join(dict.fromkeys(row.note for row in group if row.note))
    if not known:
        return replace(first, note=note)
    counts = [row.n or 1 for row in known]
    n = sum(counts)
    values = [float(row.value) for row in known if row.value is not None]
    mean = sum(count * value for count, value in zip(counts, values, strict=True)) / n
    # Σ(x − x̄)² of the union = within each group (from its standard error) + between the groups
    squares = 0.0
    for count, row, value in zip(counts, known, values, strict=True):
        squares += (row.stderr or 0.0) ** 2 * count * (count - 1) + count * (value - mean) ** 2
    stderr = math.sqrt(squares / (n * (n - 1))) if n > 1 else None
    return replace(first, value=mean, stderr=stderr, n=n, exact=all(row.exact for row in known), note=note)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow: pip install 'fullrank[store]'.") from None
    return pyarrow, parquet
