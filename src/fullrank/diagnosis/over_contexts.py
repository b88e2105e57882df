"""How fast the heads of a layer change with the context, beside the same architecture at its own initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from fullrank.diagnosis.evidence import INITIALISATION, MEASURED, Evidence
from fullrank.diagnosis.failure import Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.thresholds import effect_limits
from fullrank.report.verdict import Comparison, Severity
from fullrank.table import Slope, headline, in_context

__all__ = ["NEEDS_LENGTHS", "Exponent", "Growth", "attention_of", "growths", "signed", "span", "suspected"]

NEEDS_LENGTHS = "needs two or more lengths of the same sequences: --contexts 256,1024,4096."

_Values = Mapping[int, Mapping[int, float]]
"""Head → context → value."""


class Exponent(NamedTuple):
    """A number grows like context^value: the exponent, its standard error and its 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Growth:
    """How a metric of one layer's heads grows with the context.

    Attributes:
        metric: a name of the vocabulary.
        stack: of the model.
        layer: from 1.
        part: the attention call.
        contexts: tokens, rising.
        exponents: of each head.
        values: of each of these heads, at each context.
        initial: the same at the initialisation; empty where that was not run at these contexts.
    """

    metric: str
    stack: str
    layer: int
    part: str
    contexts: tuple[int, ...]
    exponents: Mapping[int, Exponent]
    values: _Values
    initial: _Values

    @property
    def together(self) -> Exponent:
        """Of g = √(mean over heads of g_h²), so that a head counts as much as it passes on.

        The least-squares slope of log g. Since d log g / d log T = Σ g_h² e_h / Σ g_h², e the exponents of the heads,
        its standard error and the reach of its interval are the same means of the heads' own, as if all erred
        together: they are never too small.
        """
        weight = {head: sum(g * g for g in by_context.values()) for head, by_context in self.values.items()}
        value = _exponent({context: self.size(context) for context in self.contexts})
        assert value is not None  # some head is positive wherever another is
        stderr, below, above = (
            sum(weight[head] * width for head, width in widths.items()) / sum(weight.values())
            for widths in (
                {head: e.stderr for head, e in self.exponents.items()},
                {head: e.value - e.low for head, e in self.exponents.items()},
                {head: e.high - e.value for head, e in self.exponents.items()},
            )
        )
        return Exponent(value, stderr, value - below, value + above)

    @property
    def slowest(self) -> int:
        """The head that grows slowest."""
        return min(self.exponents, key=lambda head: self.exponents[head].value)

    @property
    def together_at_first(self) -> float | None:
        """`together` at the initialisation; None where that was not run at these contexts."""
        return _exponent({c: _root_mean_square(self.initial, c) for c in self.contexts}) if self.initial else None

    def at_first(self, head: int) -> float | None:
        """The exponent of one head at the initialisation; None where that was not run at these contexts."""
        return _exponent(self.initial[head]) if self.initial else None

    def size(self, context: int) -> float:
        """Root of the mean square over heads."""
        return _root_mean_square(self.values, context)

    def compared(self, exponent: Exponent, initial: float | None, null: float) -> Comparison:
        """The exponent beside that of the initialisation, or the null where the former was not run."""
        where = f"{self.stack} layer {self.layer}, exponent from {self.contexts[0]} to {self.contexts[-1]} tokens"
        if initial is None:
            return Comparison(self.metric, where, exponent.value, exponent.stderr, "null", null)
        return Comparison(self.metric, where, exponent.value, exponent.stderr, "initialisation", initial)


def growths(evidence: Evidence, metric: str, *, least: float = 0.0) -> list[Growth]:
    """Of every attention call that was seen at several contexts, with an interval for each of its heads.

    Left out are layers that read a stream at the floor, and those of which a head has no interval (a single sequence).

    Args:
        evidence: rows, slopes and references.
        metric: one that heads have.
        least: heads that are nowhere above this are left out: what they have is rounding.

    Returns:
        By stack, part and layer.
    """
    slopes = [s for s in evidence.slopes if s.metric == metric and s.site == "attention" and s.head is not None]
    measured, initial = (_by_place(evidence, metric, source) for source in (MEASURED, INITIALISATION))
    found = []
    for (stack, part, layer), some in groupby(sorted(slopes, key=_place), key=_place):
        of_layer = list(some)
        scope = headline({slope.scope for slope in of_layer})
        of_layer = [slope for slope in of_layer if slope.scope == scope]
        contexts = max((slope.contexts for slope in of_layer), key=len)
        values = _at_contexts(measured, (stack, part, layer), scope, contexts)
        values = {head: by_context for head, by_context in values.items() if max(by_context.values()) > least}
        exponents = {s.head: e for s in of_layer if s.head in values and (e := _interval(s)) is not None}
        if not values or len(exponents) < len(values) or evidence.at_floor(stack, layer - 1):
            continue
        first = _at_contexts(initial, (stack, part, layer), scope, contexts)
        first = {head: first[head] for head in values if head in first}
        complete = first if len(first) == len(values) else {}
        found.append(Growth(metric, stack, layer, part, contexts, exponents, values, complete))
    return found


def span(values: Sequence[float]) -> str:
    """`−0.51`, or `−0.51 to −0.42`, for a sentence."""
    low, high = (signed(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def signed(value: float, digits: str = ".2f") -> str:
    """`−0.51`."""
    return f"{value:+{digits}}".replace("-", "−")


def attention_of(growths: Sequence[Growth]) -> str:
    """`attention of decoder layers 2, 4`, for a sentence."""
    first, layers = growths[0], [one.layer for one in growths]
    attention = "attention" if first.part == "self" else f"{first.part} attention"
    return f"{attention} of {first.stack} layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def suspected(
    growths: Sequence[Growth],
    said: str,
    compared: Sequence[Comparison],
    *,
    severity: Severity = Severity.WARN,
    tested: bool = True,
    exceeded: bool = False,
) -> Suspicion:
    """What is suspected of some layers' attention, to be tested by writing the mean over tokens in all of them at once.

    Args:
        growths: of the layers of one attention call.
        said: of them, from the verb on.
        compared: their numbers.
        severity: where the test confirms it.
        tested: whether there is that test.
        exceeded: whether the numbers were held against the initialisation at the same contexts.

    Returns:
        The suspicion.
    """
    stack, part, layers = growths[0].stack, growths[0].part, tuple(one.layer for one in growths)
    mean = Intervention("mean-head", stack, layers[0], part=part, also=layers[1:])
    return Suspicion(
        claim=f"In {attention_of(growths)} {said}",
        stack=stack,
        severity=severity,
        layers=layers,
        comparisons=tuple(compared),
        tests=(Test(mean, expects="no effect", limits=effect_limits()),) if tested else (),
        exceeded=exceeded,
    )


def _place(slope: Slope) -> tuple[str, str, int]:
    return slope.stack, slope.part, slope.layer


def _interval(slope: Slope) -> Exponent | None:
    found = slope.exponent, slope.exponent_stderr, slope.exponent_low, slope.exponent_high
    return None if None in found else Exponent(*map(float, found))  # type: ignore[arg-type]


def _by_place(evidence: Evidence, metric: str, source: str) -> dict[tuple[str, str, int], dict[int, dict[str, float]]]:
    """(stack, part, layer) → head → scope → value."""
    found: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for row in evidence.rows:
        wanted = (row.metric, row.source, row.site) == (metric, source, "attention")
        if wanted and row.head is not None and row.value is not None:
            heads = found.setdefault((row.stack, row.part, row.layer), {})
            heads.setdefault(row.head, {})[row.scope] = row.value
    return found


def _at_contexts(
    rows: Mapping[tuple[str, str, int], Mapping[int, Mapping[str, float]]],
    place: tuple[str, str, int],
    scope: str,
    contexts: Sequence[int],
) -> dict[int, dict[int, float]]:
    """Of the heads that have a value at every context."""
    scopes = {context: in_context(scope, context) for context in contexts}
    return {
        head: {context: by_scope[there] for context, there in scopes.items()}
        for head, by_scope in rows.get(place, {}).items()
        if all(there in by_scope for there in scopes.values())
    }


def _root_mean_square(values: _Values, context: int) -> float:
    return math.sqrt(sum(by_context[context] ** 2 for by_context in values.values()) / len(values))


def _exponent(values: Mapping[int, float]) -> float | None:
    """Least-squares slope of log value on log context; None where a value is not positive."""
    if min(values.values()) <= 0:
        return None
    x = [math.log(context) for context in values]
    y = [math.log(value) for value in values.values()]
    x_bar, y_bar = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_bar) * (b - y_bar) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_bar) ** 2 for a in x)
