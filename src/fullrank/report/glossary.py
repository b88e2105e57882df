"""What a metric's name means, for tooltips, axis titles and hovers: a view of `fullrank.metrics.VOCABULARY`."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Term", "term"]


@dataclass(frozen=True)
class Term:
    """A definition in words that can be shown; empty strings where the vocabulary says nothing."""

    name: str
    definition: str = ""
    unit: str = ""
    range: str = ""
    healthy: str = ""
    collapsed: str = ""
    null: str = ""
    source: str = ""

    @property
    def title(self) -> str:
        """The name in words with its unit, as on an axis."""
        words = self.name.replace("_", " ")
        return f"{words} ({self.unit})" if self.unit and self.unit not in ("1", "none", "dimensionless") else words


def term(metric: str) -> Term:
    """The vocabulary's entry; for a name it does not have, the name alone (reports outlive vocabularies)."""
    from fullrank.metrics import VOCABULARY

    entry = VOCABULARY.get(metric)
    if entry is None:
        return Term(metric)
    names = ("definition", "unit", "healthy", "collapsed", "null", "source")
    return Term(metric, range=_interval(entry.range), **{name: _text(getattr(entry, name)) for name in names})


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _interval(ends: tuple[float | None, float | None] | None) -> str:
    if ends is None:
        return ""
    low, high = (_end(end) for end in ends)
    return f"{'(' if '∞' in low else '['}{low}, {high}{')' if '∞' in high else ']'}"


def _end(end: float | str | None) -> str:
    if end is None:
        return "∞"
    if isinstance(end, str):
        return end
    if math.isinf(end):
        return "∞" if end > 0 else "−∞"
    return f"{end:g}".replace("-", "−")
