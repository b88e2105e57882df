"""The SPEC: one line of text that says which model is meant, the same everywhere."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fullrank.errors import SpecError

__all__ = ["FORMS", "Kind", "Spec", "close_matches", "options_of", "parse"]

Kind = Literal["hub", "directory", "config", "architecture", "python"]

FORMS = (
    "a Hugging Face hub id (bert-base-uncased), a local directory (./checkpoint), "
    "arch:NAME?option=value, a config.json file, or python:package.module:factory"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FACTORY = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<factory>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Spec:
    """A parsed SPEC.

    Attributes:
        text: as it was written.
        kind: which of the five forms it is.
        target: the hub id, the path, the architecture's name or `package.module:factory`.
        options: configuration options of an architecture, as (name, value) in the order written.
    """

    text: str
    kind: Kind
    target: str
    options: tuple[tuple[str, Any], ...] = ()


def parse(text: str) -> Spec:
    """Read a SPEC.

    An existing directory wins over a hub id of the same name; everything else is told apart by its form alone.

    Args:
        text: a Hugging Face hub id, a local directory, `arch:NAME?option=value&…`, a `config.json` file or
            `python:package.module:factory`.

    Returns:
        The parsed SPEC; nothing is loaded.

    Raises:
        SpecError: for text of none of these forms, or a path that does not exist.
    """
    text = text.strip()
    if not text:
        raise SpecError(f"SPEC is empty; it is {FORMS}.")
    prefix, colon, rest = text.partition(":")
    if colon and prefix == "arch":
        return _architecture(text, rest)
    if colon and prefix == "python":
        return _python(text, rest)
    path = Path(text).expanduser()
    if path.is_dir():
        return Spec(text, "directory", str(path))
    if path.is_file():
        if path.suffix == ".json":
            return Spec(text, "config", str(path))
        raise SpecError(f"SPEC {text!r} is a file; pass the directory it is in, or a config.json file.")
    if path.suffix == ".json" or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise SpecError(f"SPEC {text!r} looks like a path, but nothing is there.")
    if colon:
        hint = close_matches(prefix, ("arch", "python"))
        raise SpecError(f"SPEC {text!r} starts with {prefix + ':'!r}{hint}; it is {FORMS}.")
    if text == "demo":
        raise SpecError("SPEC 'demo' names no model; the packaged encoder is examined by `fullrank demo`.")
    if not _HUB_ID.fullmatch(text):
        raise SpecError(f"SPEC {text!r} is of no known form; it is {FORMS}.")
    return Spec(text, "hub", text)


def close_matches(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'vit' or 'vits'?)` where something similar is known, else nothing."""
    matches = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def _architecture(text: str, rest: str) -> Spec:
    name, _, query = rest.partition("?")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise SpecError(
            f"SPEC {text!r} names no architecture after 'arch:'; write arch:llama or arch:vit?hidden_size=64."
        )
    return Spec(text, "architecture", name, options_of(query, f"SPEC {text!r}"))


def options_of(query: str, where: str) -> tuple[tuple[str, Any], ...]:
    """Read `option=value&option=value`.

    Args:
        query: what stands after the question mark.
        where: what it belongs to, for the error.

    Returns:
        (name, value) in the order written; values are JSON where they are JSON.

    Raises:
        SpecError: for what is not of this form, or an option given twice.
    """
    options: dict[str, Any] = {}
    for piece in query.split("&") if query else ():
        option, equals, value = piece.partition("=")
        if not equals or not option:
            raise SpecError(f"{where} has the option {piece!r}; options are written name=value, joined by '&'.")
        if option in options:
            raise SpecError(f"{where} gives the option {option!r} twice.")
        options[option] = _value(value)
    return tuple(options.items())


def _python(text: str, rest: str) -> Spec:
    if not _FACTORY.fullmatch(rest):
        raise SpecError(f"SPEC {text!r} does not name a function; write python:package.module:factory.")
    return Spec(text, "python", rest)


def _value(text: str) -> Any:
    """JSON where it is JSON, Python's True, False and None, else the text itself."""
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
