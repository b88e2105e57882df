"""A theory: what it assumes, what it gives, and how well it fits before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption

__all__ = ["Theory", "theory"]

_LEAST = 1e-3  # a fit below it is none

Rows = Callable[[Architecture], Sequence[Row]]


@dataclass(frozen=True)
class Theory:
    """From an architecture to rows.

    Attributes:
        key: of the paper's card, and after `theory:` the source of the rows.
        title: a few words, with the arXiv id.
        assumes: each with the degree to which it holds.
        gives: the metrics of its rows.
        rows: predicts.
    """

    key: str
    title: str
    assumes: tuple[Assumption, ...]
    gives: tuple[str, ...]
    rows: Rows

    def fit(self, architecture: Architecture) -> float:
        """How well its assumptions hold together: the product of their degrees, 0 below a thousandth."""
        found = math.prod(min(1.0, max(0.0, one.degree(architecture))) for one in self.assumes)
        return found if found >= _LEAST else 0.0

    def reasons(self, architecture: Architecture) -> tuple[str, ...]:
        """Why it says nothing of an architecture: what holds least; empty where it speaks."""
        if self.fit(architecture) > 0:
            return ()
        least = max(0.0, min(one.degree(architecture) for one in self.assumes))
        return tuple(one.reason(architecture) for one in self.assumes if one.degree(architecture) <= least)


def theory(key: str, *, title: str, assumes: Sequence[Assumption], gives: Sequence[str]) -> Callable[[Rows], Theory]:
    """Make a theory of a function from an architecture to rows.

    Args:
        key: of the paper's card.
        title: a few words, with the arXiv id.
        assumes: what it takes for granted.
        gives: the metrics of its rows.

    Returns:
        A decorator that gives a `Theory`.
    """

    def made(rows: Rows) -> Theory:
        return Theory(key, title, tuple(assumes), tuple(gives), rows)

    return made
