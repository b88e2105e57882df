"""The remedies on the terminal: every one in a line, or one in full."""

from __future__ import annotations

import json as encoding
from typing import Any

import typer

from fullrank.remedies import CATALOGUE, Remedy, remedy_of

__all__ = ["record", "show"]

_FIELDS = {
    "formula": "what it computes",
    "exactness": "at the moment of applying",
    "cost": "what it costs",
}
_SAYS = {
    "identity-now": "the function stays as it is",
    "init-only": "for fresh weights; the function changes",
    "changes-function": "the function changes at once",
}


def show(name: str | None, *, json: bool) -> None:
    """Print every remedy there is, or one in full.

    Args:
        name: of one; None for all.
        json: print a JSON list of all, or a JSON object of the one.
    """
    chosen = None if name is None else remedy_of(name)
    if json:
        made: Any = [record(each) for each in CATALOGUE.values()] if chosen is None else record(chosen)
        typer.echo(encoding.dumps(made, ensure_ascii=False, indent=2, allow_nan=False))
    elif chosen is None:
        _all()
    else:
        _one(chosen)


def record(remedy: Remedy) -> dict[str, Any]:
    """A remedy in plain values."""
    return {
        "name": remedy.name,
        "title": remedy.title,
        "addresses": list(remedy.addresses),
        "acts_on": remedy.acts_on,
        "exactness": remedy.exactness,
        "formula": remedy.formula,
        "parameters": [
            {"name": one.name, "says": one.says, "default": one.default, "accepts": one.range}
            for one in remedy.parameters
        ],
        "limits": list(remedy.limits),
        "cost": remedy.cost,
        "structural": remedy.structural,
        "papers": list(remedy.papers),
    }


def _all() -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    for acts_on in dict.fromkeys(one.acts_on for one in CATALOGUE.values()):
        grid = Table(Column("remedy", no_wrap=True), Column("exactness", no_wrap=True), "what it does", box=None)
        grid.pad_edge = False
        for one in CATALOGUE.values():
            if one.acts_on == acts_on:
                grid.add_row(*map(Text, (one.name, one.exactness, one.title)))
        console.print(Text(f"On {acts_on}\n", style="bold"), grid, Text())
    for word, meaning in _SAYS.items():
        console.print(Text(f"{word}: {meaning}.", style="dim"))
    console.print(Text("\nfullrank remedies NAME says what one of them computes and when it does not help."))
    console.print(Text("fullrank screen SPEC tries those that a model's verdicts call for."))


def _one(remedy: Remedy) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("for", style="dim"), Text(", ".join(remedy.addresses)))
    for field, words in _FIELDS.items():
        value = getattr(remedy, field)
        grid.add_row(Text(words, style="dim"), Text(_SAYS.get(value, value)))
    for index, one in enumerate(remedy.parameters):
        default = (
            "none"
            if one.default is None
            else str(one.default).lower()
            if isinstance(one.default, bool)
            else one.default
        )
        line = f"{one.name} = {default}: {one.says} ({one.range})"
        grid.add_row(Text("" if index else "parameters", style="dim"), Text(line))
    for heading, lines in (("limits", remedy.limits), ("papers", remedy.papers)):
        for index, line in enumerate(lines):
            grid.add_row(Text("" if index else heading, style="dim"), Text(line))
    console = Console()
    console.print(Text(f"{remedy.name}: {remedy.title}", style="bold"))
    console.print(grid)
    chosen = next((f"?{one.name}={one.choices[-1]}" for one in remedy.parameters if one.choices), "")
    console.print(Text(f"\nfullrank screen SPEC --try '{remedy.name}{chosen}'"))
