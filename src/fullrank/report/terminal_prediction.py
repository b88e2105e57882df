"""A prediction on a terminal: the architecture, the theories that speak of it, the answers, and who was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fullrank.report.prediction import Prediction
from fullrank.report.wording import number
from fullrank.theory.answer import Answer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["NEXT", "answer_facts", "answer_words", "answered", "left_out", "plain_words"]

NEXT = (
    ("--overlay", "the same model measured at its own initialisation, in the same figures"),
    ("--vary residual_scale=0.1:2:50 --vary qk_std=0.001:0.2:50", "a map of what trains, with this architecture in it"),
)

_PLAIN = {
    "∞": "inf",
    "−": "-",
    "–": "-",
    "√": "sqrt ",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "×": "x",
    "·": "-",
    "²": "^2",
    "ρ": "rho",
    "σ": "sigma",
    "β": "beta",
    "λ": "lambda",
    "₀": "0",
    "₁": "1",
    "₂": "2",
}


def answered(prediction: Prediction, *, ascii_only: bool) -> Iterator[RenderableType]:
    """What comes first: the architecture in words, the standings, the answers.

    Args:
        prediction: of a report.
        ascii_only: whether the terminal shows nothing else.

    Yields:
        What rich prints.
    """
    from rich.table import Table as Grid
    from rich.text import Text

    said = plain_words if ascii_only else str
    yield Text(said(f"{prediction.sentence}."), overflow="fold")
    yield Text("\ntheories, by how well their assumptions hold", style="bold")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for place, one in enumerate(prediction.standings):
        strained = ", ".join(f"{says} ({number(degree)})" for says, degree in one.visibly_strained)
        style = "bold" if place == 0 else ""
        words = Text(said(one.title), style=style)
        if strained:
            words.append(said(f"; in part: {strained}"), style="dim")
        grid.add_row(Text(said(number(one.fit))), Text(one.key, style=style), words)
    yield grid
    if not prediction.standings:
        yield Text("none speaks of this architecture", style="yellow")
    if prediction.answers:
        yield Text("\nanswers", style="bold")
        lines = Grid.grid(padding=(0, 1, 0, 0))
        for answer in prediction.answers:
            lines.add_row("-" if ascii_only else "·", Text(said(answer_words(answer)), overflow="fold"))
        yield lines


def answer_words(answer: Answer) -> str:
    """One sentence with its uncertainty and where it comes from."""
    _, between = answer_facts(answer)
    return f"{answer.says.rstrip('.')}{f' ({between})' if between else ''} [{answer.theory}]"


def answer_facts(answer: Answer) -> tuple[str, str]:
    """The number to type in, and its uncertainty where that shows in three digits; empty where there is none."""
    value = "" if answer.value is None else number(answer.value)
    low, high = number(answer.low), number(answer.high)
    known = answer.low is not None and answer.high is not None and low != high
    return value, f"between {low} and {high}" if known else ""


def plain_words(words: str) -> str:
    """Text for a terminal that shows nothing but ASCII."""
    for sign, plain in _PLAIN.items():
        words = words.replace(sign, plain)
    return words.encode("ascii", "replace").decode("ascii")


def left_out(prediction: Prediction, *, ascii_only: bool) -> Iterator[RenderableType]:
    """Theories that say nothing of the architecture, and why.

    Args:
        prediction: of a report.
        ascii_only: whether the terminal shows nothing else.

    Yields:
        What rich prints; nothing where all speak.
    """
    from rich.table import Table as Grid
    from rich.text import Text

    if not prediction.left_out:
        return
    yield Text("\nleft out", style="bold")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for one in prediction.left_out:
        words = "; ".join(one.because)
        grid.add_row(Text(one.key, style="dim"), Text(plain_words(words) if ascii_only else words, overflow="fold"))
    yield grid
