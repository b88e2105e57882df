"""The vocabulary on the terminal: every metric in a line, or one in full."""

from __future__ import annotations

import json as encoding
import math
from dataclasses import asdict
from typing import Any

import typer

from fullrank.errors import TableError
from fullrank.metrics import VOCABULARY
from fullrank.metrics.definition import Definition
from fullrank.spec.grammar import close_matches

__all__ = ["show"]

_LEVELS = {
    "token": "Of the tokens of one sequence",
    "batch": "Of several sequences together",
    "sample": "Of any set of vectors",
    "attention": "Of an attention call",
    "gradient": "Of what a backward brings",
    "weight": "Of weights",
    "output": "Of what the model returns",
}
_FIELDS = ("definition", "unit", "range", "healthy", "collapsed", "null", "level", "per_head", "cost", "source")


def show(name: str | None, *, json: bool) -> None:
    """Print the vocabulary, or one metric of it.

    Args:
        name: one metric; None for all.
        json: print a JSON list of all, or a JSON object of the one, with infinite ends as "inf" and "-inf".

    Raises:
        TableError: for a name that is no metric.
    """
    if name is not None and name not in VOCABULARY:
        raise TableError(
            f"NAME {name!r} is no metric{close_matches(name, VOCABULARY)}; `fullrank metrics` lists all of them."
        )
    if json:
        chosen: Any = _record(VOCABULARY[name]) if name else [_record(each) for each in VOCABULARY.values()]
        typer.echo(encoding.dumps(chosen, ensure_ascii=False, indent=2, allow_nan=False))
    elif name is not None:
        _one(VOCABULARY[name])
    else:
        _all()


def _all() -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    for level, title in _LEVELS.items():
        grid = Table(Column("metric", no_wrap=True), "range", "healthy", "collapsed", box=None, pad_edge=False)
        for each in VOCABULARY.values():
            if each.level == level:
                grid.add_row(*map(Text, (each.name, _range(each), each.healthy, each.collapsed)))
        if grid.row_count:
            console.print(Text(f"{title}\n", style="bold"), grid, Text())
    console.print(Text("fullrank metrics NAME says how one of them is defined."))


def _one(definition: Definition) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for field in _FIELDS:
        value = _range(definition) if field == "range" else getattr(definition, field)
        words = ("yes" if value else "no") if isinstance(value, bool) else str(value) or "none"
        grid.add_row(Text(field.replace("_", " "), style="dim"), Text(words))
    console = Console()
    console.print(Text(definition.name, style="bold"))
    console.print(grid)


def _range(definition: Definition) -> str:
    low, high = (f"{end:g}".replace("inf", "∞") for end in definition.range)
    return f"{low} to {high}"


def _record(definition: Definition) -> dict[str, Any]:
    record = asdict(definition)
    record["range"] = [end if math.isfinite(end) else str(end) for end in definition.range]
    record["invariances"] = sorted(definition.invariances)
    return record
