"""The report on a terminal: what was examined, one line per layer with small bars, notes, what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fullrank.report.headlines import Cell, Column, Headlines, headlines
from fullrank.report.series import series_of
from fullrank.report.wording import examined, row_notes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as Grid
    from rich.text import Text

    from fullrank.report.report import Report

__all__ = ["bar", "render"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SHORT = {
    "centred stable rank": "stable rank",
    "centred effective rank": "eff. rank",
    "token energy": "token energy",
    "norm. entropy": "norm. entropy",
}
_MOST_NOTES = 8


def render(
    reports: Sequence[Report], labels: Sequence[str], *, width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """The lines of one report, or of several one after the other."""
    from rich.text import Text

    for report, label in zip(reports, labels, strict=True):
        yield from _header(report, label)
        yield Text()
        floor = False
        for one in series_of((report,), ("",)):
            for table in headlines(one.rows):
                title = Text(table.title, style="bold")
                if one.label:
                    title.append(f"  {one.label}", style="dim")
                yield title
                yield _grid(table, width=width, ascii_only=ascii_only)
                floor = floor or table.has_floor
        if floor:
            yield Text(f"{_floor(ascii_only)} made of rounding: the tokens differ by no more than the float floor", style="dim")
        yield from _notes(report, ascii_only=ascii_only)
    yield from _next(reports)


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of `share` of `width` characters, in eighths; at least a sliver for anything above 0."""
    if ascii_only:
        return ("#" * max(round(share * width), int(share > 0))).ljust(width)
    eighths = max(round(share * width * 8), int(share > 0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _header(report: Report, label: str) -> Iterator[Text]:
    from rich.text import Text

    facts = examined(report.about)
    if label:
        yield Text(label, style="bold underline")
    pad = max((len(name) for name, _ in facts), default=0) + 2
    for name, words in facts:
        if name == "created":
            continue
        line = Text(name.ljust(pad), style="dim")
        line.append(words, style="bold" if name == "model" else "not dim")
        yield line


def _grid(table: Headlines, *, width: int, ascii_only: bool) -> Grid:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid
    from rich.text import Text

    room = (width - 8) // max(len(table.columns), 1) - 2  # what a column has beside its padding
    bars = min(6, room - 7)
    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", safe_box=True)
    grid.add_column("layer", justify="right", no_wrap=True, vertical="bottom")
    for column in table.columns:
        grid.add_column(Text(_heading(column)), justify="left", vertical="bottom", overflow="fold")
    for layer, cells in table.lines:
        grid.add_row(str(layer), *(_cell(cell, bars, ascii_only=ascii_only) for cell in cells))
    return grid


def _heading(column: Column) -> str:
    heading = _SHORT.get(column.heading, column.heading)
    return f"{heading}\n{column.caption}" if column.caption else heading


def _cell(cell: Cell, bars: int, *, ascii_only: bool) -> Text:
    from rich.text import Text

    words = cell.text
    if ascii_only:
        words = words.replace("–", "-").replace("−", "-").replace("∞", "inf")
    text = Text(no_wrap=True)
    if bars >= 2 and words:
        drawn = " " * bars if cell.share is None else bar(cell.share, bars, ascii_only=ascii_only)
        text.append(drawn + " ", style="blue")
    text.append(words, style="dim" if cell.share is None else "")
    if cell.floor:
        text.append(_floor(ascii_only), style="yellow")
    return text


def _floor(ascii_only: bool) -> str:
    return "_" if ascii_only else "⌊"


def _notes(report: Report, *, ascii_only: bool) -> Iterator[Text]:
    from rich.text import Text

    said = [str(note) for note in report.about.get("notes") or []]
    said += [f"{metrics}: {note}" for note, metrics in row_notes(report.rows)]
    if not said:
        return
    yield Text("\nnotes", style="bold")
    for note in said[:_MOST_NOTES]:
        line = Text("- " if ascii_only else "· ", style="dim")
        line.append(note, style="not dim")
        yield line
    if len(said) > _MOST_NOTES:
        yield Text(f"  and {len(said) - _MOST_NOTES} more, in the saved report and in report.notes", style="dim")


def _next(reports: Sequence[Report]) -> Iterator[Text]:
    from rich.text import Text

    rows = sum(len(report.rows) for report in reports)
    yield Text("\nnext", style="bold")
    for command, words in (
        ("fullrank metrics", "what each number means, what is healthy and what is collapsed"),
        ("--html report.html", f"all {rows:,} numbers: profiles, every head, singular values"),
        ("--json report.json", "the same for programs; Report.load reads it back"),
    ):
        line = Text(f"  {command:<20}")
        line.append(words, style="dim")
        yield line
