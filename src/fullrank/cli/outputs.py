"""Output paths are tried before any work is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fullrank.errors import OutputError

__all__ = ["check_writable"]


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
