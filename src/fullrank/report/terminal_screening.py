"""A screening on a terminal: what came out, then a line for every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

from fullrank.report.screening_columns import Column, columns, number_columns
from fullrank.report.screening_words import MEANINGS
from fullrank.report.terminal import next_steps, noted
from fullrank.report.terminal_prediction import plain_words
from fullrank.report.wording import number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as Grid

    from fullrank.report.screened import Screened
    from fullrank.report.screening import Screening

__all__ = ["render"]


def render(
    screening: Screening, *, width: int, ascii_only: bool, page_written: bool = False
) -> Iterator[RenderableType]:
    """The lines of a screening, no wider than the terminal.

    Args:
        screening: what to show.
        width: characters that a line may have.
        ascii_only: whether the terminal shows nothing else.
        page_written: whether its page has been written already.

    Yields:
        What rich prints.
    """
    from rich.text import Text

    plain = plain_words if ascii_only else str
    about = screening.about
    if about.get("model"):
        yield Text(plain(str(about["model"])), style="bold", overflow="fold")
    yield Text(plain(f"{screening.said}\n"), overflow="fold")
    chosen = _fitting(screening, width)
    if screening.ranked:
        heading = f"after {screening.steps} steps, ranked by loss"
        yield Text(plain(heading), style="bold")
        yield _table(screening, screening.rows, chosen, plain)
    else:
        yield _table(screening, [screening.as_it_is], chosen, plain)
        for group, rows in screening.groups().items():
            # one text, so that it is folded as a whole
            yield Text.assemble((plain(f"\n{group}"), "bold"), (plain(f": {MEANINGS[group]}"), "dim"))
            yield _table(screening, rows, chosen, plain)
    yield from _first_number(screening, {column.name for column in chosen}, plain)
    remarks = [f"{row.variant}: {row.note}" for row in screening.rows if row.note]
    yield from noted([*screening.notes, *remarks], rest="on the page and in the JSON", ascii_only=ascii_only)
    steps = [
        ("--html screening.html", "profiles before and after, over depth"),
        ("--json > screening.json", "the same for programs"),
    ]
    if not screening.ranked:
        steps.insert(0, ("--steps 150", "train each candidate and rank them by loss"))
    yield from next_steps(steps, page_written=page_written)


def _first_number(screening: Screening, shown: Set[str], plain: Callable[[str], str]) -> Iterator[RenderableType]:
    """Of the columns that are shown: which number before → after is, where it should be, and what a distance says."""
    from rich.text import Text

    numbers = next((row.restored for row in screening.rows if row.restored), ())
    for index, one in enumerate(numbers):
        if f"restored {index}" not in shown:
            continue
        known = [("own initialisation", one.reference), ("null", one.null)]
        beside = [f"{name} {number(value)}" for name, value in known if value is not None]
        beside += [f"should be {number(one.target)}" if one.target is not None else "no reference"]
        own = f", the number of {one.failure}" if one.failure else ""
        said = f"before and after: {one.metric}, {one.place}{own} ({', '.join(beside)})"
        yield Text(plain(f"\n{said}" if index == min(_shown(shown)) else said), style="dim", overflow="fold")
    if "distance" in shown:
        said = "from identity: how far the network is from doing nothing, which would restore every profile"
        yield Text(plain(said), style="dim", overflow="fold")


def _shown(shown: Set[str]) -> list[int]:
    return [int(name.split()[1]) for name in shown if name.startswith("restored ")]


def _fitting(screening: Screening, width: int) -> list[Column]:
    """As many columns as there is room for, the most important first."""
    room = width - max(len(row.variant) for row in screening.rows) - 5
    chosen: list[Column] = []
    for column in _columns(screening):
        room -= column.width + 2
        if room < 0 and chosen:
            break
        chosen.append(column)
    return chosen


def _columns(screening: Screening) -> list[Column]:
    """Each of the failures' numbers in a column: the first where one stands for all, others behind the distance."""
    numbers = number_columns(screening)
    asked = [column for column in columns(screening) if column.name != "restored"]
    if screening.ranked:
        at = 1 + max(
            (index for index, one in enumerate(asked) if one.name in ("loss", "change", "distance")), default=-1
        )
        return [*asked[:at], *numbers[:1], *asked[at:], *numbers[1:]]
    behind = 1 if asked and asked[0].name == "distance" else 0
    return [*numbers[:1], *asked[:behind], *numbers[1:], *asked[behind:]]


def _table(
    screening: Screening, rows: Sequence[Screened], chosen: Sequence[Column], plain: Callable[[str], str]
) -> Grid:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    longest = max(len(row.variant) for row in screening.rows)
    if screening.ranked:
        grid.add_column("", justify="right", vertical="bottom")
    grid.add_column("variant", vertical="bottom", overflow="fold", min_width=min(longest, 30))
    for column in chosen:
        grid.add_column(
            Text(plain(_broken(column))),
            vertical="bottom",
            justify="right" if column.right else "left",
            min_width=column.width,
        )
    for row in rows:
        rank = [str(screening.rank(row) or "")] if screening.ranked else []
        grid.add_row(*rank, Text(row.variant, style="bold"), *(Text(plain(column.words(row))) for column in chosen))
    return grid


def _broken(column: Column) -> str:
    """The heading in lines no longer than the column."""
    import textwrap

    return "\n".join(textwrap.wrap(column.heading, max(column.width, 8)))
