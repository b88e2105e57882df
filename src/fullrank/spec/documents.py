"""Texts to read: those that ship with the package, a file, or the lines of a JSON-lines file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fullrank.errors import BatchError

__all__ = ["Documents", "from_jsonl", "from_text", "shipped"]


@dataclass(frozen=True)
class Documents:
    """Texts and how sequences are cut from them.

    Attributes:
        texts: the texts, none of them empty.
        names: what each is called in sentences.
        source: what they are, for descriptions.
        cut: `first`: the first tokens of every document; `continued`: the same, a document that is too short going on
            with the following ones; `stretches`: consecutive stretches of a single text.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    source: str
    cut: str


def shipped(count: int) -> Documents:
    """The first `count` of the texts that ship with the package, in a fixed order.

    Args:
        count: how many; at least 1.

    Returns:
        The documents.

    Raises:
        BatchError: where more are asked for than ship.
    """
    files = sorted(
        (file for file in (resources.files("fullrank.spec") / "texts").iterdir() if file.name.endswith(".txt")),
        key=lambda file: file.name,
    )
    if count > len(files):
        raise BatchError(
            f"documents={count}, but {len(files)} texts ship with fullrank; use documents<={len(files)}, "
            "or pass --text or --data (text=, data=)."
        )
    texts = tuple(file.read_text(encoding="utf-8").strip() for file in files[:count])
    names = tuple(file.name for file in files[:count])
    return Documents(texts, names, f"{count} texts that ship with fullrank", "continued")


def from_text(text: str | Path, *, characters: int) -> Documents:
    """One text, from a file or as it is.

    A string of several words that names no file is the text itself; every other string is a path.

    Args:
        text: path or text.
        characters: how much of it may be needed; the rest is not read.

    Returns:
        The documents: one.

    Raises:
        BatchError: for a file that cannot be read, or text with nothing in it.
    """
    if isinstance(text, str) and (not text.strip() or len(text.split()) > 1) and not _is_file(text):
        content, name = text[:characters], "text="
    else:
        content, name = _read(Path(text), argument="text", characters=characters), f"text={str(text)!r}"
    if not content.strip():
        raise BatchError(f"{name} is empty; it needs at least two tokens of text.")
    return Documents((content,), (name,), name if name != "text=" else "the text given", "stretches")


def from_jsonl(path: str | Path, *, count: int, characters: int) -> Documents:
    """The field `text` of the first `count` lines of a JSON-lines file.

    Args:
        path: the file; blank lines in it are skipped.
        count: how many documents at most.
        characters: how much of each may be needed.

    Returns:
        The documents.

    Raises:
        BatchError: for a file that cannot be read, has no lines, or a line without such a field (naming the line).
    """
    texts: list[str] = []
    names: list[str] = []
    shown = f"data={str(path)!r}"
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                texts.append(_field(line, where=f"{shown}, line {number}")[:characters])
                names.append(f"{shown}, line {number}")
                if len(texts) == count:
                    break
    except OSError as error:
        raise BatchError(f"{shown} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise BatchError(f"{shown} is not UTF-8 text.") from None
    if not texts:
        raise BatchError(f"{shown} has no lines; each line is a JSON object with a field 'text'.")
    return Documents(tuple(texts), tuple(names), f"{len(texts)} documents of {shown}", "first")


def _field(line: str, *, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BatchError(f"{where} is not JSON ({error.msg}); each line is an object with a field 'text'.") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"has the fields {sorted(record)}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        found = "has a field 'text' that is no string" if isinstance(record, dict) and "text" in record else found
        raise BatchError(f"{where} {found}; each line is a JSON object with a field 'text'.")
    if not record["text"].strip():
        raise BatchError(f"{where} has an empty field 'text'.")
    return str(record["text"])


def _read(path: Path, *, argument: str, characters: int) -> str:
    shown = f"{argument}={str(path)!r}"
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except OSError as error:
        raise BatchError(f"{shown} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise BatchError(f"{shown} is not UTF-8 text.") from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False
