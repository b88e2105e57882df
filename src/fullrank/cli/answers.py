"""How the command line answers when something is wrong: one line, an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fullrank.errors import FullrankError

__all__ = ["BAD_INPUT", "FOUND", "INTERRUPTED", "answering"]

FOUND = 1  # a verdict at or above --fail-on
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def answering() -> Iterator[None]:
    """Turn bad input into its sentence and exit code 2, and Ctrl-C into one line and exit code 130.

    Anything else is a fault of fullrank's own and keeps its traceback.

    Raises:
        Exit: with the code.
    """
    try:
        yield
    except FullrankError as error:
        typer.echo(f"fullrank: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("fullrank: interrupted; nothing was written.", err=True)
        raise typer.Exit(INTERRUPTED) from None
