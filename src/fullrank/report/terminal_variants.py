"""Variants on a terminal: what each is, what could not be examined, what changed most, and the last layer of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fullrank.report.headlines import Column, headlines
from fullrank.report.remarks import remarks
from fullrank.report.terminal import next_steps, noted
from fullrank.report.verdict import Severity
from fullrank.report.wording import row_notes, scope_words, weights_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as Grid

    from fullrank.report.report import Report
    from fullrank.report.variants import Variants

__all__ = ["render"]

_FACTS = ("architecture", "weights", "dtype", "sequences", "tokens", "seconds", "verdicts")


def render(variants: Variants, *, width: int, ascii_only: bool, page_written: bool = False) -> Iterator[RenderableType]:
    """The lines of a series of variants, no wider than the terminal.

    Args:
        variants: what to show.
        width: characters that a line may have.
        ascii_only: whether the terminal shows nothing else.
        page_written: whether their page has been written already.

    Yields:
        What rich prints.
    """
    from rich.text import Text

    said = "1 variant" if len(variants) == 1 else f"{len(variants)} variants, in order"
    yield Text(said, style="bold")
    yield _facts(variants)
    if variants.failed:
        yield Text("\nnot examined", style="bold red")
        yield _listed([(one.label, one.reason) for one in variants.failed])
    yield from _changes(variants, ascii_only=ascii_only)
    yield from _last_layers(variants, width=width, ascii_only=ascii_only)
    yield from noted(
        _notes(variants), rest="in the saved series and in the notes of each report", ascii_only=ascii_only
    )
    rows = sum(len(report.rows) for report in variants.reports)
    yield from next_steps(
        [
            ("--html series.html", f"all {rows:,} numbers, every metric against the variants"),
            ("--json > series.json", "the same for programs; fullrank.Variants.load reads it back"),
        ],
        page_written=page_written,
    )


def _notes(variants: Variants) -> list[str]:
    """Those of comparing, then what reports say in their notes, each once, then what their numbers and rows say."""
    said = [*variants.notes]
    said += [str(note) for report in variants.reports for note in report.about.get("notes") or []]
    for report, label in zip(variants.reports, variants.labels, strict=True):
        said += [f"{label}: {remark}" for remark in remarks(report.rows)]
    noted_rows = row_notes(row for report in variants.reports for row in report.rows)
    said += [f"{metrics}: {note}" for note, metrics in noted_rows]
    return list(dict.fromkeys(said))


def _facts(variants: Variants) -> Grid:
    lines = []
    for report, label in zip(variants.reports, variants.labels, strict=True):
        about, given = report.about, report.about.get("input") or {}
        found = {
            "architecture": about.get("architecture"),
            "weights": weights_words(about.get("fresh")),
            "dtype": about.get("dtype"),
            "sequences": given.get("sequences"),
            "tokens": given.get("tokens"),
            "seconds": None if about.get("seconds") is None else f"{float(about['seconds']):.1f}",
            "verdicts": _verdicts(report),
        }
        lines.append((label, [str(found[name] if found[name] is not None else "") for name in _FACTS]))
    return _table("variant", [name if name != "seconds" else "s" for name in _FACTS], lines)


def _verdicts(report: Report) -> str:
    """How many verdicts of each severity, gravest first; empty where nobody looked."""
    if report.diagnosis is None:
        return ""
    counts = Counter(verdict.severity for verdict in report.verdicts)
    return ", ".join(f"{counts[one]} {one}" for one in reversed(Severity) if counts[one]) or "none"


def _changes(variants: Variants, *, ascii_only: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    if len(variants) < 2:
        return
    changes = variants.changes()
    first, last = variants.labels[0], variants.labels[-1]
    arrow = "->" if ascii_only else "→"
    yield Text(f"\nlargest changes, {first} {arrow} {last}", style="bold")
    if not changes:
        yield Text("none that exceeds two standard errors and two hundredths of its scale", style="dim")
        return
    lines = []
    for change in changes:
        words = change.words.replace("→", arrow)
        words = words.replace("−", "-") if ascii_only else words
        lines.append((change.metric, [change.place, str(change.layer), change.scope, words]))
    yield _table("metric", ["stack", "layer", "tokens", f"first {arrow} last"], lines)


def _last_layers(variants: Variants, *, width: int, ascii_only: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    tables = [headlines(report.rows) for report in variants.reports]
    scopes: dict[str, None] = {}
    for title in dict.fromkeys(table.title for of_report in tables for table in of_report):
        here = [next((table for table in of_report if table.title == title), None) for of_report in tables]
        columns = {c.metric: c for table in here if table for c in table.columns}
        chosen = _fitting(columns, variants.labels, width)
        lines = []
        for label, table in zip(variants.labels, here, strict=True):
            cells = {} if table is None else {c.metric: cell.text for c, cell in table.pairs(table.lines[-1][1])}
            layer = "" if table is None else str(table.lines[-1][0])
            words = [cells.get(metric, "") for metric in chosen]
            lines.append((label, [layer, *(word.replace("−", "-") if ascii_only else word for word in words)]))
        heads = [columns[metric].heading.replace(" ", "\n") for metric in chosen]
        scopes |= dict.fromkeys(columns[metric].scope for metric in chosen if columns[metric].scope != "all")
        yield Text(f"\n{title}, last layer", style="bold")
        yield _table("variant", ["layer", *heads], lines)
    for scope in scopes:
        yield Text(f"{scope}: {scope_words(scope)}", style="dim")


def _fitting(columns: Mapping[str, Column], labels: tuple[str, ...], width: int) -> list[str]:
    """The metrics whose columns fit beside the longest label; at least one."""
    room = width - max(len(label) for label in (*labels, "variant")) - 9
    most = max(1, room // 12)
    return list(columns)[:most]


def _table(first: str, heads: list[str], lines: list[tuple[str, list[str]]]) -> Grid:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column(first, vertical="bottom", overflow="fold")
    for head in heads:
        grid.add_column(Text(head), vertical="bottom", justify="right" if head in ("layer", "s", "tokens") else "left")
    for label, words in lines:
        grid.add_row(Text(label, style="bold"), *map(Text, words))
    return grid


def _listed(lines: list[tuple[str, str]]) -> Grid:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2, 0, 0))
    for label, words in lines:
        grid.add_row(Text(label), Text(words, overflow="fold"))
    return grid
