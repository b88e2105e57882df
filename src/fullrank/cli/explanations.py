"""The verdicts on the terminal: every one in a line, or one in full."""

from __future__ import annotations

import json as encoding
from typing import Any

import typer

from fullrank.diagnosis import THRESHOLDS, Failure
from fullrank.diagnosis.catalogue import FAILURES, failure_of
from fullrank.remedies.candidates import CANDIDATES

__all__ = ["show"]

_FIELDS = {
    "means": "what it is",
    "harmless": "when it is harmless",
    "tested": "how it is tested",
    "refuted_by": "what refutes it",
    "valid_for": "for which weights",
    "command": "what to run next",
}


def show(name: str | None, *, json: bool) -> None:
    """Print every verdict there is, or one in full.

    Args:
        name: of one; None for all.
        json: print a JSON list of all, or a JSON object of the one.
    """
    chosen = None if name is None else failure_of(name)
    if json:
        made: Any = [_record(each) for each in FAILURES] if chosen is None else _record(chosen)
        typer.echo(encoding.dumps(made, ensure_ascii=False, indent=2, allow_nan=False))
    elif chosen is None:
        _all()
    else:
        _one(chosen)


def _all() -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    grid = Table(Column("verdict", no_wrap=True), "title", "for weights", box=None, pad_edge=False)
    for each in FAILURES:
        grid.add_row(*map(Text, (each.name, each.title, each.valid_for)))
    console = Console()
    console.print(grid)
    console.print(Text("\nfullrank explain VERDICT says what one of them means and how it is tested."))


def _one(failure: Failure) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    record = _record(failure)
    for field, words in _FIELDS.items():
        grid.add_row(Text(words, style="dim"), Text(record[field]))
    for index, one in enumerate(record["thresholds"]):
        limit = f"{one['name'].partition('.')[2]} {one['value']:.3g} ({one['unit']}): {one['reason']}"
        grid.add_row(Text("" if index else "limits", style="dim"), Text(limit))
    for index, name in enumerate(record["candidates"]):
        grid.add_row(Text("" if index else "remedies to try", style="dim"), Text(name))
    for index, paper in enumerate(failure.papers):
        grid.add_row(Text("" if index else "papers", style="dim"), Text(paper))
    console = Console()
    console.print(Text(f"{failure.name}: {failure.title}", style="bold"))
    console.print(grid)


def _record(failure: Failure) -> dict[str, Any]:
    limits = [one for one in THRESHOLDS.values() if one.name.startswith(f"{failure.name}.")]
    return {
        "name": failure.name,
        "title": failure.title,
        **{field: getattr(failure, field) for field in _FIELDS},
        "command": failure.command.format(model="SPEC"),
        "thresholds": [
            {"name": one.name, "value": one.value, "unit": one.unit, "reason": one.reason} for one in limits
        ],
        "candidates": list(CANDIDATES.get(failure.name, ())),
        "papers": list(failure.papers),
    }
