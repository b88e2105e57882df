"""Rows as JSON and as Parquet, and a file that is either written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.errors import OutputError, TableError
from fullrank.table.rows import COLUMNS, Row

if TYPE_CHECKING:
    import pandas

__all__ = ["SCHEMA_VERSION", "check_schema", "write_atomically"]

SCHEMA_VERSION = 1


def to_records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """JSON-ready rows, the note included where there is one."""
    records = []
    for row in rows:
        record = asdict(row)
        record = {name: record[name] for name in (*COLUMNS, "note")}
        for name in ("value", "stderr"):
            if record[name] is not None and math.isinf(record[name]):
                record[name] = "inf" if record[name] > 0 else "-inf"  # JSON has no infinity
        if not record["note"]:
            del record["note"]
        records.append(record)
    return records


def from_records(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows from what `to_records` gave.

    Returns:
        The rows in the same order.

    Raises:
        TableError: for a record with missing or unknown columns.
    """
    rows = []
    for record in records:
        if not set(COLUMNS) <= set(record) <= {*COLUMNS, "note"}:
            raise TableError(f"a row has the columns {sorted(record)}; expected {', '.join(COLUMNS)}.")
        values = {
            name: float(record[name]) if isinstance(record[name], str) else record[name] for name in ("value", "stderr")
        }
        rows.append(Row(**{**record, **values}))
    return rows


def to_json(rows: Iterable[Row]) -> str:
    """`{"schema": 1, "rows": […]}`."""
    return json.dumps({"schema": SCHEMA_VERSION, "rows": to_records(rows)}, allow_nan=False)


def from_json(text: str) -> list[Row]:
    """The rows in what `to_json` gave.

    Returns:
        The rows in the same order.

    Raises:
        TableError: for text that is not such JSON, or of another schema version.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"this is not JSON: {error}.") from None
    check_schema(document)
    return from_records(document["rows"])


def to_parquet(frame: pandas.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a frame of the columns and the note as Parquet, with the schema version in its metadata."""
    pyarrow, parquet = _pyarrow()
    arrow = pyarrow.Table.from_pandas(frame, preserve_index=False)
    arrow = arrow.replace_schema_metadata({"fullrank.schema": str(SCHEMA_VERSION)})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(arrow, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def from_parquet(path: str | os.PathLike[str]) -> list[Row]:
    """Read what `to_parquet` wrote.

    Returns:
        The rows in the same order.

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
    return [Row(**record) for record in arrow.to_pylist()]


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


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow: pip install 'fullrank[store]'.") from None
    return pyarrow, parquet
