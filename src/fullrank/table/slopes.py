"""How a number changes as the context grows: one slope per place and metric, with its interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fullrank.errors import TableError

if TYPE_CHECKING:
    import pandas

__all__ = ["SLOPE_COLUMNS", "Slope", "slope_frame", "slope_of"]


@dataclass(frozen=True, slots=True)
class Slope:
    """The least-squares slope of a number against log₂ of the context, taken per sequence and then averaged.

    Attributes:
        stack: as in `Row`.
        layer: as in `Row`.
        site: as in `Row`.
        part: as in `Row`.
        head: None where the number does not belong to one head.
        scope: what the number was taken over at each context, without the context: `all`, `late`, `late+no-sink`, …
        metric: a name of `fullrank.metrics.VOCABULARY`.
        contexts: tokens, rising; at least two.
        n: sequences that have the number at every one of these contexts.
        per_doubling: mean over sequences of the change of the value per doubling of the context, in its own unit; None
            where it could not be had, and then `note` says why.
        stderr: standard error of that mean; None for one sequence, and for numbers of a whole batch.
        low: lower end of the 95 % interval of Student's t with n − 1 degrees of freedom; None where `stderr` is.
        high: its upper end.
        exponent: the same of log value against log context: the value grows like context^exponent. None unless the
            value is positive throughout.
        exponent_stderr: its standard error.
        exponent_low: lower end of its interval.
        exponent_high: upper end of its interval.
        note: why something is missing.
    """

    stack: str
    layer: int
    site: str
    part: str
    metric: str
    head: int | None
    scope: str
    contexts: tuple[int, ...]
    n: int
    per_doubling: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    exponent: float | None = None
    exponent_stderr: float | None = None
    exponent_low: float | None = None
    exponent_high: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", tuple(int(context) for context in self.contexts))

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


_FIELDS = tuple(field.name for field in fields(Slope))
SLOPE_COLUMNS = (
    *("stack", "layer", "site", "part", "head", "scope", "metric", "contexts", "n"),
    *("per_doubling", "stderr", "low", "high"),
    *("exponent", "exponent_stderr", "exponent_low", "exponent_high"),
)
_WHOLE = ("layer", "head", "n")
_TEXT = ("stack", "site", "part", "scope", "metric")


def slope_frame(slopes: Iterable[Slope]) -> pandas.DataFrame:
    """One line per slope with nullable columns; `contexts` holds tuples."""
    import pandas as pd

    slopes = list(slopes)
    columns: dict[str, Any] = {}
    for name in SLOPE_COLUMNS:
        values = [getattr(slope, name) for slope in slopes]
        if name == "contexts":
            columns[name] = pd.Series(values, dtype=object)
        else:
            dtype = "Int64" if name in _WHOLE else "str" if name in _TEXT else "Float64"
            columns[name] = pd.array(values, dtype=dtype)  # type: ignore[call-overload]
    return pd.DataFrame(columns)


def slope_of(record: Any) -> Slope:
    """The slope in one record of a report file.

    Returns:
        The slope.

    Raises:
        TableError: for a record that has other fields.
    """
    if not isinstance(record, dict) or sorted(record) != sorted(_FIELDS):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise TableError(f"a slope has {found}; expected {', '.join(_FIELDS)}.")
    return Slope(**record)
