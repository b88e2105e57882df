"""What verdicts are made from: the rows of a report, beside those of its references."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from fullrank.report import Report
from fullrank.report.verdict import Comparison, Weights
from fullrank.table import Row, Slope, headline, without_context

__all__ = ["Evidence"]

MEASURED, INITIALISATION = "measured", "initialisation"
_UNSTRUCTURED = ("random tokens", "synthetic images", "synthetic sound")
T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """Rows by place, measured and of the same architecture at its own initialisation.

    Numbers are asked for at their headline scope (`late` for causal attention, `all` elsewhere) unless a scope is
    given; those of single contexts are left out.

    Attributes:
        rows: of the report, of every source.
        about: of the report.
        slopes: over contexts.
        weights: whether they look trained or fresh.
        bos: whether the tokenizer has a token for the beginning and the batch begins with it; None where unknown.
        epsilon: of the optimiser; None where none was given.
        dtypes: names of dtypes whose range is asked for beside the run's own.
    """

    rows: Sequence[Row]
    about: Mapping[str, Any] = field(default_factory=dict)
    slopes: Sequence[Slope] = ()
    weights: Weights = "unknown"
    bos: bool | None = None
    epsilon: float | None = None
    dtypes: tuple[str, ...] = ()

    @classmethod
    def of(cls, report: Report, **known: Any) -> Evidence:
        """That of a report and of its reference."""
        of_reference = () if report.reference is None else report.reference.rows
        return cls((*report.rows, *of_reference), report.about, report.context_slopes, **known)

    @cached_property
    def _by_place(self) -> dict[tuple[Any, ...], dict[str, Row]]:
        found: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.rows:
            if without_context(row.scope)[1] is None:
                key = (row.source, row.metric, row.stack, row.layer, row.site, row.part, row.head)
                found.setdefault(key, {})[row.scope] = row
        return found

    @cached_property
    def _by_metric(self) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
        found: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        for key in self._by_place:
            found.setdefault((key[0], key[1]), []).append(key)
        return found

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What several failures read off the same rows, made when it is first asked for.

        Args:
            key: what it is, and every threshold that it rests on.
            make: makes it.

        Returns:
            The same object for the same key.
        """
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    @property
    def stacks(self) -> dict[str, Mapping[str, Any]]:
        """What the report says of each stack: blocks, heads, width, causal."""
        return {str(stack["name"]): stack for stack in self.about.get("stacks") or []}

    @property
    def dtype(self) -> str:
        """In which the model ran, such as `float32`."""
        return str(self.about.get("dtype") or "float32")

    @property
    def unstructured(self) -> str:
        """What the input was, where it has nothing that a trained model could look for: `random tokens`; else empty."""
        kind = str((self.about.get("input") or {}).get("kind") or "")
        return kind if kind in _UNSTRUCTURED else ""

    def of_metric(
        self,
        metric: str,
        stack: str,
        *,
        site: str | None = None,
        part: str | None = None,
        scope: str | None = None,
        source: str = MEASURED,
    ) -> Iterator[Row]:
        """Rows of a metric in a stack that have a value, by layer and head.

        Args:
            metric: a name of the vocabulary.
            stack: of the model.
            site: only there.
            part: only of it.
            scope: by default the headline of each place.
            source: `measured` or `initialisation`.

        Yields:
            One row a place.
        """
        keys = [key for key in self._by_metric.get((source, metric), []) if key[2] == stack]
        for key in sorted(keys, key=lambda key: (key[3], -1 if key[6] is None else key[6], key[4], key[5])):
            if site in (None, key[4]) and part in (None, key[5]):
                by_scope = self._by_place[key]
                row = by_scope.get(scope or headline(by_scope))
                if row is not None and row.value is not None:
                    yield row

    def course(self, metric: str, stack: str, **where: Any) -> dict[int, Row]:
        """A metric over layers, of a place that heads do not have."""
        return {row.layer: row for row in self.of_metric(metric, stack, **where) if row.head is None}

    def heads(self, metric: str, stack: str, **where: Any) -> dict[tuple[int, int], Row]:
        """A metric over (layer, head)."""
        rows = self.of_metric(metric, stack, **where)
        return {(row.layer, row.head): row for row in rows if row.head is not None}

    def initial(self, row: Row) -> Row | None:
        """The same number of the same architecture at its own initialisation, where it has a value."""
        key = (INITIALISATION, row.metric, row.stack, row.layer, row.site, row.part, row.head)
        found = self._by_place.get(key, {}).get(row.scope)
        return found if found is not None and found.value is not None else None

    def null(self, stack: str, metric: str) -> float | None:
        """What Gaussian tokens of the stack's shape give."""
        value = ((self.about.get("nulls") or {}).get(stack) or {}).get(metric)
        return None if value is None else float(value)

    def at_floor(self, stack: str, layer: int) -> bool:
        """Whether the stream's tokens differ by rounding alone after a layer: nothing rests on its numbers."""
        return (stack, layer) in self._at_floor

    @cached_property
    def _at_floor(self) -> frozenset[tuple[str, int]]:
        rows = (self.course("residual", stack, site="stream", part="out").values() for stack in self.stacks)
        return frozenset((row.stack, row.layer) for some in rows for row in some if "float floor" in row.note)

    def compared(self, row: Row) -> Comparison:
        """A row beside its initialisation, where that is there."""
        assert row.value is not None
        head = "" if row.head is None else f", head {row.head}"
        where, initial = f"{row.stack} layer {row.layer}{head}", self.initial(row)
        if initial is None:
            return Comparison(row.metric, where, row.value, row.stderr)
        return Comparison(row.metric, where, row.value, row.stderr, "initialisation", initial.value)
