"""Where pages go: tried before any work is done, and told at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from fullrank.errors import OutputError

__all__ = ["check_writable", "tell_page"]


def check_writable(path: Path | None, *, option: str) -> None:
    """Refuse a path that cannot be written, before minutes are spent on what would go there.

    A file without a name is made in the directory and is gone at once, so that nothing is left behind.

    Args:
        path: where something will be written; None passes.
        option: the option that named it, for the sentence.

    Raises:
        OutputError: where the path is `-`, or a directory, or its directory is missing or cannot be written.
    """
    if path is None:
        return
    shown = f"{option} {str(path)!r} cannot be written"
    if str(path) == "-":
        raise OutputError(f"{shown}: no page goes to standard output; name a file, such as report.html.")
    if path.is_dir():
        raise OutputError(f"{shown}: it is a directory.")
    if not path.parent.is_dir():
        raise OutputError(f"{shown}: the directory {str(path.parent)!r} does not exist.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{shown}: {error.strerror or error}.") from None


def tell_page(path: Path | None, *, json: bool) -> None:
    """Say where the page lies, on standard error where standard output is JSON.

    Args:
        path: where it was written; None where none was asked for.
        json: whether standard output is JSON and nothing else.
    """
    if path is not None:
        start = "" if json else "\n"
        typer.echo(f"{start}The page: {path.resolve()}", err=json)
