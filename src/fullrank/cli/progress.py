"""What is being done and how long it will still take, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Tell", "progress"]

Tell = Callable[[str, float], None]
"""Called with a few words and the share of the work that is done, from 0 to 1."""


@contextmanager
def progress(*, shown: bool) -> Iterator[Tell]:
    """A bar that says the layer and the time left; nothing at all where standard error is no terminal.

    The bar is wiped when it ends, so that only the report stays.

    Args:
        shown: False to show nothing even on a terminal.

    Yields:
        What to call when there is progress.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")
        began = time.monotonic()
        said = ""

        def tell(what: str, share: float) -> None:
            nonlocal began, said
            # the bar redraws itself ten times a second: a layer that is done sooner would never be seen
            fresh, said = what != said, what
            if share <= 0:
                began = time.monotonic()  # loading took its own time and says nothing about the rest
                bar.update(task, description=what, total=None, left="", refresh=fresh)
                return
            left = (time.monotonic() - began) * (1 - share) / share
            bar.update(task, description=what, total=1.0, completed=share, left=time_left(left), refresh=fresh)

        yield tell


def time_left(seconds: float) -> str:
    """`about 12 s left`, `about 3 min left`."""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left"
