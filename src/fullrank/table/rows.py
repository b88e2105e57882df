"""One row of the table: a number, where it was taken, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from fullrank.errors import TableError
from fullrank.table.scopes import context_of

__all__ = ["COLUMNS", "FIELDS", "KEY", "Row", "headline"]

COLUMNS = (
    "source",
    "stack",
    "layer",
    "site",
    "part",
    "head",
    "scope",
    "metric",
    "value",
    "stderr",
    "n",
    "exact",
)
SITES = ("stream", "read", "attention", "mlp", "weights", "gradient")
KEY = COLUMNS[:8]


@dataclass(frozen=True, slots=True)
class Row:
    """One number: where it was taken, over what, its value and how sure it is.

    Attributes:
        stack: `decoder`, `encoder`, `vision`, …
        layer: 0 before the first block, n after the n-th block call.
        site: `stream`, `read`, `attention`, `mlp`, `weights` or `gradient`.
        part: `out`, `mid`, `self`, `cross`, `self.1`, a weight's role, …
        metric: a name of `fullrank.metrics.VOCABULARY`.
        value: mean over sequences; None where it could not be had, and then `note` says why.
        head: None where the number does not belong to one head.
        scope: tokens joined by `+` in fixed order, such as `all`, `late`, `late+no-sink`.
        stderr: standard error of `value` over the `n` sequences; None where n = 1.
        n: how many sequences (or samples) entered.
        exact: False where rows, probes or iterations were sampled or capped.
        source: `measured`, `initialisation` or `theory:<card key>`.
        note: why the value is missing, or what to know when reading it.
    """

    stack: str
    layer: int
    site: str
    part: str
    metric: str
    value: float | None
    head: int | None = None
    scope: str = "all"
    stderr: float | None = None
    n: int | None = 1
    exact: bool = True
    source: str = "measured"
    note: str = ""

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise TableError(f"site={self.site!r} is not one of {', '.join(SITES)}.")
        if self.value is not None and math.isnan(self.value):
            object.__setattr__(self, "value", None)
        if self.stderr is not None and math.isnan(self.stderr):
            object.__setattr__(self, "stderr", None)
        if self.value is None and not self.note:
            raise TableError(f"a row of {self.metric!r} without a value must say why in its note.")

    @property
    def key(self) -> tuple[Any, ...]:
        """What the number is of: every column but value, stderr, n and exact."""
        return (
            self.source,
            self.stack,
            self.layer,
            self.site,
            self.part,
            self.head,
            self.scope,
            self.metric,
        )


FIELDS = tuple(field.name for field in fields(Row))


def headline(scopes: Iterable[str]) -> str:
    """The scope a number is read at first: `late` where it was taken (causal attention), else `all`.

    Args:
        scopes: those there are.

    Returns:
        The scope; of others than these two the first by name, those of one context after those of whole sequences.
    """
    scopes = set(scopes)
    for scope in ("late", "all"):
        if scope in scopes:
            return scope
    return min(scopes, key=lambda scope: (context_of(scope) is not None, scope), default="all")
