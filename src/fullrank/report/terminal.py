"""The report on a terminal: what was examined, one line per layer with small bars, notes, what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fullrank.report.headlines import Cell, Column, Headlines
from fullrank.report.headlines_predicted import tables_of
from fullrank.report.remarks import remarks
from fullrank.report.terminal_diagnosis import TIMES, beside, checked, verdicts
from fullrank.report.terminal_prediction import NEXT, answered, left_out
from fullrank.report.terminal_prediction import plain_words as _plain
from fullrank.report.trends import contexts_of, counted, steepest
from fullrank.report.wording import examined, row_notes, scope_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as Grid
    from rich.text import Text

    from fullrank.report.report import Report

__all__ = ["bar", "next_steps", "noted", "render"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_NOTES = 8
_MOST_TRENDS = 6


def render(
    reports: Sequence[Report], labels: Sequence[str], *, width: int, ascii_only: bool, page_written: bool = False
) -> Iterator[RenderableType]:
    """The lines of one report, or of several one after the other.

    Args:
        reports: at least one.
        labels: one name each; empty where there is nothing to tell apart.
        width: characters that a line may have.
        ascii_only: whether the terminal shows nothing else.
        page_written: whether their page has been written already.

    Yields:
        What rich prints.
    """
    from rich.text import Text

    for report, label in zip(reports, labels, strict=True):
        yield from _header(report, label)
        yield Text()
        if report.diagnosis is not None:
            yield from verdicts(report.diagnosis, ascii_only=ascii_only)
            yield Text()
        if report.prediction is not None:
            yield from answered(report.prediction, ascii_only=ascii_only)
            yield Text()
        floor = False
        scopes: dict[str, None] = {}
        for source, table in tables_of(report):
            title = Text(_plain(table.title) if ascii_only else table.title, style="bold")
            if source:
                title.append(f"  {source}", style="dim")
            yield title
            for part in _fitting(beside(table, report), width):
                yield _grid(part, width=width, ascii_only=ascii_only)
            floor = floor or table.has_floor
            scopes |= dict.fromkeys(table.scopes)
        for scope in scopes:
            yield Text(f"{scope}: {scope_words(scope)}", style="dim")
        if floor:
            yield Text(
                f"{_floor(ascii_only)} made of rounding: the tokens differ by no more than the float floor", style="dim"
            )
        yield from _trends(report, ascii_only=ascii_only)
        if report.diagnosis is not None:
            yield from checked(report.diagnosis, ascii_only=ascii_only)
        if report.prediction is not None:
            yield from left_out(report.prediction, ascii_only=ascii_only)
        yield from _notes(report, ascii_only=ascii_only)
    rows = sum(len(report.rows) for report in reports)
    predicted = all(report.prediction is not None for report in reports)
    explained = ("fullrank explain VERDICT", "what a verdict means, when it is harmless, how it is tested")
    yield from next_steps(
        [
            *(NEXT if predicted else (explained,)),
            ("fullrank metrics", "what each number means, what is healthy and what is collapsed"),
            ("--html report.html", f"all {rows:,} numbers: profiles, every head, singular values"),
            ("--json > report.json", "the same for programs; Report.load reads it back"),
        ],
        page_written=page_written,
    )


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of `share` of `width` characters, in eighths; at least a sliver for anything above 0."""
    if ascii_only:
        return ("#" * max(round(share * width), int(share > 0))).ljust(width)
    eighths = max(round(share * width * 8), int(share > 0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _header(report: Report, label: str) -> Iterator[RenderableType]:
    from rich.table import Table as Grid
    from rich.text import Text

    facts = examined(report.about)
    if label:
        yield Text(label, style="bold underline")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for name, words in facts:
        if name != "created":
            grid.add_row(Text(name, style="dim"), Text(words, style="bold" if name == "model" else "", overflow="fold"))
    yield grid


def _grid(table: Headlines, *, width: int, ascii_only: bool) -> Grid:
    from rich.table import Table as Grid
    from rich.text import Text

    headings = [_heading(column) for column in table.columns]
    if ascii_only:
        headings = [heading.replace("×", "x") for heading in headings]
    bars = _lengths(table, width)
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column("layer", justify="right", no_wrap=True, vertical="bottom")
    for heading in headings:
        grid.add_column(Text(heading), no_wrap=True, vertical="bottom")
    for layer, cells in table.lines:
        grid.add_row(str(layer), *(_cell(c, n, ascii_only=ascii_only) for c, n in zip(cells, bars, strict=True)))
    return grid


def _barred(table: Headlines, index: int) -> bool:
    """Whether any number of a column has a bar."""
    return any(cells[index].share is not None for _, cells in table.lines)


def _heading(column: Column) -> str:
    """One word a line, so that a column is no wider than its numbers need."""
    said = {"value": (), "mean": ("(mean)",), "max": ("(largest)",), "min": ("(smallest)",)}[column.reduced]
    scope = () if column.scope == "all" else (column.scope,)
    return "\n".join((*column.heading.split(), *said, *scope))


def _lengths(table: Headlines, width: int) -> list[int]:
    """Characters of each column's bars; where there is no room for all, those of the first column alone."""
    barred = [_barred(table, index) for index in range(len(table.columns))]
    bars = _bars(table, width)
    if bars or not any(barred):
        return [bars if one else 0 for one in barred]
    spare = width - len("layer") - sum(_widths(table, 0)) - 1
    alone = min(spare, 6) if spare > 1 else 0
    return [alone if index == barred.index(True) else 0 for index in range(len(barred))]


def _bars(table: Headlines, width: int) -> int:
    """How many characters every bar can have so that the whole line fits."""
    fits = (bars for bars in range(6, 1, -1) if len("layer") + sum(_widths(table, bars)) <= width)
    return next(fits, 0)


def _widths(table: Headlines, bars: int) -> list[int]:
    """Characters per column, the space before it included."""
    widths = []
    for index, column in enumerate(table.columns):
        texts = [len(cells[index].text) + cells[index].floor for _, cells in table.lines]
        words = [len(word) for word in _heading(column).split()]
        widths.append(2 + max(max(texts) + (bars + 1 if bars and _barred(table, index) else 0), *words))
    return widths


def _fitting(table: Headlines, width: int) -> Iterator[Headlines]:
    """The table, or where even its bare numbers are too wide, its columns in several tables, about as wide each."""
    groups: list[list[int]] = []
    for index, column in enumerate(table.columns):
        if column.heading == TIMES and groups:
            groups[-1].append(index)  # a ratio stays beside what it is of
        else:
            groups.append([index])
    columns = _widths(table, 0)
    first = next((index for index in range(len(columns)) if _barred(table, index)), None)
    if first is not None:
        columns[first] += 3  # the shortest bar, and a space
    widths, room = [sum(columns[index] for index in group) for group in groups], width - len("layer")
    fewest = len(_filled(widths, room))
    narrowest = next(one for one in range(max(1, room // fewest), room + 1) if len(_filled(widths, one)) == fewest)
    for taken in _filled(widths, narrowest):
        yield _part(table, [index for group in taken for index in groups[group]])


def _filled(widths: Sequence[int], room: int) -> list[list[int]]:
    """Which columns stand together, where none but a single one is wider than there is room."""
    parts: list[list[int]] = [[]]
    for index, wide in enumerate(widths):
        if parts[-1] and sum(widths[other] for other in parts[-1]) + wide > room:
            parts.append([])
        parts[-1].append(index)
    return parts


def _part(table: Headlines, taken: list[int]) -> Headlines:
    lines = tuple((layer, tuple(cells[index] for index in taken)) for layer, cells in table.lines)
    return replace(table, columns=tuple(table.columns[index] for index in taken), lines=lines)


def _cell(cell: Cell, bars: int, *, ascii_only: bool) -> Text:
    from rich.text import Text

    words = cell.text
    if ascii_only:
        words = words.replace("–", "-").replace("−", "-").replace("∞", "inf").replace("×", "x")
    text = Text(no_wrap=True)
    if bars and words:
        drawn = " " * bars if cell.share is None else bar(cell.share, bars, ascii_only=ascii_only)
        text.append(drawn + " ", style="blue")
    text.append(words, style="dim" if cell.share is None else "")
    if cell.floor:
        text.append(_floor(ascii_only), style="yellow")
    return text


def _floor(ascii_only: bool) -> str:
    return "_" if ascii_only else "⌊"


def _trends(report: Report, *, ascii_only: bool) -> Iterator[RenderableType]:
    from rich.table import Table as Grid
    from rich.text import Text

    if not report.context_slopes:
        return
    contexts = ", ".join(map(str, contexts_of(report.rows)))
    yield Text(f"\nby context ({contexts} tokens)", style="bold")
    lines = Grid.grid(padding=(0, 1, 0, 0))
    for trend in steepest(report.context_slopes, report.rows, most=_MOST_TRENDS, each=1):
        said = f"{trend.slope.metric} of {trend.where} {trend.said}"
        if ascii_only:
            said = said.replace("−", "-")
        lines.add_row("-" if ascii_only else "·", Text(said, overflow="fold"))
    if lines.row_count:
        yield lines
    yield Text(counted(report.context_slopes), style="dim")


def _notes(report: Report, *, ascii_only: bool) -> Iterator[RenderableType]:
    said = [*map(str, report.about.get("notes") or []), *remarks(report.rows)]
    said += [f"{metrics}: {note}" for note, metrics in row_notes(report.rows)]
    yield from noted(said, rest="in the saved report and in report.notes", ascii_only=ascii_only)


def noted(said: Sequence[str], *, rest: str, ascii_only: bool) -> Iterator[RenderableType]:
    """The section of notes: the first few, and how many more there are.

    Args:
        said: all of them, what matters most first.
        rest: where those are that are not shown.
        ascii_only: whether the terminal shows nothing else.

    Yields:
        What rich prints; nothing without notes.
    """
    from rich.table import Table as Grid
    from rich.text import Text

    if not said:
        return
    yield Text("\nnotes", style="bold")
    notes = Grid.grid(padding=(0, 1, 0, 0))
    for note in said[:_MOST_NOTES]:
        notes.add_row("-" if ascii_only else "·", Text(note, overflow="fold"))
    yield notes
    if len(said) > _MOST_NOTES:
        yield Text(f"  and {len(said) - _MOST_NOTES} more, {rest}", style="dim")


def next_steps(steps: Sequence[tuple[str, str]], *, page_written: bool) -> Iterator[RenderableType]:
    """The last section: commands and options, and what they give.

    Args:
        steps: pairs of the two.
        page_written: whether a page has been written already: `--html` is then no news.

    Yields:
        What rich prints.
    """
    from rich.table import Table as Grid
    from rich.text import Text

    yield Text("\nnext", style="bold")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for command, words in steps:
        if not (page_written and command.startswith("--html")):
            grid.add_row(Text(command), Text(words, style="dim"))
    yield grid
