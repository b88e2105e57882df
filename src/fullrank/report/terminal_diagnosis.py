"""The diagnosis on a terminal: verdicts first, then what was clear and what could not be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fullrank.report.headlines import Cell, Column, Headlines
from fullrank.report.verdict import Checked, Diagnosis, Effect, Severity, Verdict, Weights
from fullrank.report.wording import number

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fullrank.report.report import Report

__all__ = ["KINDS", "TIMES", "beside", "checked", "compared", "effect_words", "named_once", "verdicts", "weights_look"]

_COLOURS = {Severity.NOTE: "cyan", Severity.WARN: "yellow", Severity.FAIL: "bold red"}
_COMPARED = ("token_energy", "update_share", "gradient_rms")
"""Headlines that stand beside their ratio to the initialisation."""
TIMES = "× init"
KINDS = (
    "heads: p points each query to keys of its own, m mixes, a averages (much the same for every query), "
    "s rests on one key"
)
_SHORT = {"pointer": "p", "mixer": "m", "average": "a", "sink": "s"}


def verdicts(diagnosis: Diagnosis, *, ascii_only: bool) -> Iterator[RenderableType]:
    """What was found, with effects and what to run next; how the weights and the reference are known.

    Args:
        diagnosis: of a report.
        ascii_only: whether the terminal shows nothing else.

    Yields:
        What rich prints.
    """
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2, 0, 0))
    for verdict in diagnosis.verdicts:
        words = Text(_plain(verdict.claim, ascii_only), overflow="fold")
        for effect in verdict.effects:
            words.append(f"\n{_plain(effect_words(effect), ascii_only)}", style="dim")
        tested = "" if verdict.effects or verdict.severity is not Severity.NOTE else _untested(verdict, diagnosis)
        words.append(f"\n{tested}next: {verdict.command}", style="dim")
        if verdict.candidates and verdict.severity is not Severity.NOTE:
            tries = ", ".join(name.partition("?")[0] for name in verdict.candidates[:3])
            words.append(f"\nremedies, such as {tries}: {verdict.screen}", style="dim")
        grid.add_row(
            Text(verdict.severity, style=_COLOURS[verdict.severity]), Text(verdict.name, overflow="fold"), words
        )
    yield Text("verdicts", style="bold")
    if diagnosis.verdicts:
        yield grid
    else:
        yield Text("none: nothing that was looked for was found.")
    for line in _how(diagnosis):
        yield Text(_plain(line, ascii_only), style="dim")


def checked(diagnosis: Diagnosis, *, ascii_only: bool) -> Iterator[RenderableType]:
    """What is clear, with the numbers that say so, and what could not be checked and why."""
    yield from _listed("checked and clear", diagnosis.clear, ascii_only=ascii_only)
    yield from _listed("not checked", diagnosis.unchecked, ascii_only=ascii_only)


def effect_words(effect: Effect) -> str:
    """An effect as one line: what was done, what it changed, its interval, over how many documents."""
    of = "" if effect.baseline is None else f" on {number(effect.baseline)}"
    interval = f"{number(effect.low)} to {number(effect.high)}"
    return f"{effect.intervention}: {number(effect.change)} {effect.unit}{of} (95 %: {interval}; {effect.n} documents)"


def named_once(words: str) -> str:
    """`encoder: one; encoder: two; decoder: three` without the name that the clause before it had too."""
    clauses = []
    before = ""
    for clause in words.split("; "):
        name, colon, rest = clause.partition(": ")
        clauses.append(rest if colon and name == before else clause)
        before = name if colon else ""
    return "; ".join(clauses)


def beside(table: Headlines, report: Report) -> Headlines:
    """The table with the kinds of each layer's heads and the ratio of some columns to the initialisation.

    Args:
        table: headlines of one stack of the report.
        report: with or without a reference and a diagnosis.

    Returns:
        The table with more columns.
    """
    columns: list[Column] = []
    lines: dict[int, list[Cell]] = {layer: [] for layer, _ in table.lines}
    initial = _initial(table, report)
    for index, column in enumerate(table.columns):
        columns.append(column)
        for layer, cells in table.lines:
            lines[layer].append(cells[index])
        if column.metric in _COMPARED and initial.get(column.metric):
            columns.append(Column(column.metric, TIMES, "value", "all", unit=False, bars=False))
            for layer in lines:
                lines[layer].append(Cell(_times(initial[column.metric].get(layer))))
    kinds = _kinds(report, table.title)
    if kinds and any(column.metric == "normalized_entropy" for column in table.columns):
        columns.append(Column("selectivity", "heads", "value", "all", unit=False, bars=False))
        for layer in lines:
            lines[layer].append(Cell(kinds.get(layer, "")))
    return replace(table, columns=tuple(columns), lines=tuple((layer, tuple(lines[layer])) for layer in lines))


def _initial(table: Headlines, report: Report) -> dict[str, dict[int, float | None]]:
    """By metric and layer: the value over that of the initialisation."""
    if report.reference is None:
        return {}
    stack = table.title.split(" · ")[0]
    wanted = {column.metric: column.scope for column in table.columns if column.metric in _COMPARED}
    site = {"token_energy": "stream", "update_share": "stream", "gradient_rms": "gradient"}
    found: dict[str, dict[int, float | None]] = {}
    expected = {row.key[1:]: row.value for row in report.reference.rows if row.metric in wanted}
    for row in report.rows:
        if row.stack != stack or row.part != "out" or wanted.get(row.metric) != row.scope:
            continue
        if row.site == site[row.metric] and row.head is None:
            other = expected.get(row.key[1:])
            ratio = row.value / other if other and row.value is not None else None
            found.setdefault(row.metric, {})[row.layer] = ratio
    return {metric: layers for metric, layers in found.items() if any(value is not None for value in layers.values())}


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{number(ratio)}×"


def _kinds(report: Report, stack: str) -> dict[int, str]:
    """By layer: how many heads of each kind, such as `2p 9m 1a`."""
    if report.diagnosis is None:
        return {}
    counts: dict[int, Counter[str]] = {}
    for name, layer, _, kind in report.diagnosis.kinds:
        if name == stack:
            counts.setdefault(layer, Counter())[kind] += 1
    return {layer: " ".join(f"{of[k]}{s}" for k, s in _SHORT.items() if of[k]) for layer, of in counts.items()}


def _how(diagnosis: Diagnosis) -> Iterator[str]:
    because = f": {diagnosis.because}" if diagnosis.because else ""
    yield f"{weights_look(diagnosis.weights)}{because}"
    if diagnosis.reference:
        yield compared(diagnosis.reference)
    if diagnosis.outcome:
        yield f"tested by: {diagnosis.outcome}"
    if diagnosis.kinds:
        yield KINDS


def _untested(verdict: Verdict, diagnosis: Diagnosis) -> str:
    """What would test a verdict that no intervention has tested; empty where none can."""
    return "not tested: --verify would; " if not diagnosis.outcome and "--verify" in verdict.command else ""


def compared(reference: str) -> str:
    """How the reference at initialisation was made, or that there is none, as the beginning of a sentence."""
    return reference if reference.startswith("no reference") else f"compared with: {reference}"


def weights_look(weights: Weights) -> str:
    """Trained or fresh, as the beginning of a sentence."""
    return "trained or fresh is not known" if weights == "unknown" else f"{weights} weights"


def _listed(title: str, entries: Sequence[Checked], *, ascii_only: bool) -> Iterator[RenderableType]:
    from rich.table import Table as Grid
    from rich.text import Text

    if not entries:
        return
    yield Text(f"\n{title}", style="bold")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for entry in entries:
        words = _plain(named_once(entry.words), ascii_only)
        grid.add_row(Text(entry.name, overflow="fold"), Text(words, style="dim", overflow="fold"))
    yield grid


def _plain(words: str, ascii_only: bool) -> str:
    return words.replace("−", "-").replace("×", "x").replace("–", "-") if ascii_only else words
