"""A report as one JSON document, exact in both directions, infinities included."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.errors import TableError
from fullrank.report.prediction import Prediction
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.verdict import Diagnosis
from fullrank.table import SCHEMA_VERSION, Table, check_schema
from fullrank.table.slopes import slope_of

if TYPE_CHECKING:
    from fullrank.report.report import Report

__all__ = ["content", "decoded", "dumps", "encoded", "loads", "parsed", "plain", "text_of"]

_NUMBER = "$number"
"""JSON has no infinity and no NaN: such a number outside the rows is written as {"$number": "inf"}."""


def plain(value: Any, *, where: str = "about") -> Any:
    """The value in JSON's own types: mappings become dicts with string keys, sequences lists.

    Args:
        value: what to convert.
        where: its place, for the error message.

    Returns:
        Equal content made of dict, list, str, int, float, bool and None.

    Raises:
        TableError: for a value that JSON cannot hold, naming its place.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value)
        case Mapping():
            return {str(key): plain(item, where=f"{where}[{key!r}]") for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    raise TableError(f"{where} is a {type(value).__name__}; a report's description holds text, numbers and lists only.")


def content(report: Report) -> dict[str, Any]:
    """A report's document.

    Args:
        report: any.

    Returns:
        `{"schema": 1, "about": {…}, "spectra": […], "rows": […]}`, and where it has them `"slopes"`, `"diagnosis"`,
        `"prediction"` and `"reference"`, a document like this one.
    """
    return {
        "schema": SCHEMA_VERSION,
        "about": encoded(report.about),
        "spectra": [encoded(asdict(spectrum)) for spectrum in report.spectra],
        **({"slopes": [encoded(asdict(slope)) for slope in report.context_slopes]} if report.context_slopes else {}),
        **({"diagnosis": encoded(report.diagnosis.to_record())} if report.diagnosis is not None else {}),
        **({"prediction": encoded(report.prediction.to_record())} if report.prediction is not None else {}),
        **({"reference": content(report.reference)} if report.reference is not None else {}),
        "rows": report.rows.to_records(),
    }


def dumps(value: Any) -> str:
    """JSON's own types as text; no NaN and no infinity, which JSON does not have."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def loads(text: str) -> Any:
    """What a text holds.

    Returns:
        JSON's own types.

    Raises:
        TableError: for text that is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"this is not JSON: {error}.") from None


def parsed(document: Any) -> dict[str, Any]:
    """What `content` gave of a report.

    Args:
        document: in JSON's own types.

    Returns:
        The fields of a `Report`; that of the reference as such fields, or None.

    Raises:
        TableError: for what is no such document, or of another schema version.
    """
    check_schema(document)
    about, spectra, slopes = document.get("about"), document.get("spectra", []), document.get("slopes", [])
    if not isinstance(about, dict) or not isinstance(spectra, list) or not isinstance(slopes, list):
        raise TableError("this is not a fullrank report: it has no 'about', or its 'spectra' or 'slopes' are no list.")
    diagnosis, reference, prediction = (document.get(name) for name in ("diagnosis", "reference", "prediction"))
    return {
        "rows": Table.from_records(document["rows"]),
        "about": decoded(about),
        "spectra": tuple(_spectrum(record) for record in spectra),
        "context_slopes": tuple(slope_of(decoded(record)) for record in slopes),
        "diagnosis": None if diagnosis is None else Diagnosis.from_record(decoded(diagnosis)),
        "prediction": None if prediction is None else Prediction.from_record(decoded(prediction)),
        "reference": None if reference is None else parsed(reference),
    }


def text_of(path: str | os.PathLike[str]) -> str:
    """The text of a report file.

    Returns:
        The content.

    Raises:
        TableError: for a file that cannot be read as text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TableError(f"{Path(path)} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise TableError(f"{Path(path)} cannot be read: it is not UTF-8 text, so no fullrank report.") from None


def _spectrum(record: Any) -> HeadSpectrum:
    expected = [field.name for field in fields(HeadSpectrum)]
    if not isinstance(record, dict) or sorted(record) != sorted(expected):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise TableError(f"a spectrum has {found}; expected {', '.join(expected)}.")
    return HeadSpectrum(**decoded(record))


def encoded(value: Any) -> Any:
    """The value with its infinities written as JSON can hold them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(value)}
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(item) for item in value]
    return value


def decoded(value: Any) -> Any:
    """What `encoded` gave, as it was."""
    if isinstance(value, dict):
        if set(value) == {_NUMBER}:
            return float(value[_NUMBER])
        return {key: decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return value
