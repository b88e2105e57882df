"""Rows of one number from different sequences, made one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fullrank.table.rows import Row

__all__ = ["pool"]

# The one thing the table must know of metrics: which numbers are no mean over sequences. These are computed from all
# sequences of a batch together, so that the two batches' numbers do not determine that of their union; the same holds
# for every number over `samples` in place of tokens.
_OF_THE_BATCH = frozenset(
    {"shared_energy", "sequence_energy", "token_energy", "similarity_across", "similarity_standardized"}
)
# A place in the sequence: halfway between two of them lies a third that has nothing to do with either.
_POSITIONS = frozenset({"max_abs_position", "nearest_head", "sink_position"})
# One sequence decides it: that of all batches is the largest of theirs.
_LARGEST = frozenset({"max_abs"})

_APART = "pooled from several batches; measured together it may differ"
_DIFFERENT = "positions differ between the batches"


def pool(group: Sequence[Row]) -> Row:
    """The row of the union of the sequences of several rows of one number.

    The mean is weighted by n, over the rows that have a value. The standard error is that of the union of the samples,
    Σ(x − x̄)² within each row (from its standard error) and between the rows; None where a row of several sequences
    has none. A number that belongs to a whole batch becomes a weighted mean with `exact=False`, a position is kept
    where the rows agree and else missing, both with a note. Of largest entries the largest is kept.

    Args:
        group: rows of the same key.

    Returns:
        One row of that key.
    """
    first = group[0]
    if len(group) == 1:
        return first
    notes = [row.note for row in group]
    if first.metric in _POSITIONS:
        return _agreed(group, notes)
    known = [(row, float(row.value)) for row in group if row.value is not None]
    if len(known) < 2:
        return replace(known[0][0] if known else first, note=_joined(notes))
    n = sum(row.n or 1 for row, _ in known)
    if first.metric in _LARGEST:
        largest, exact = max(value for _, value in known), all(row.exact for row, _ in known)
        return replace(first, value=largest, stderr=None, n=n, exact=exact, note=_joined(notes))
    mean = sum((row.n or 1) * value for row, value in known) / n
    exact = all(row.exact for row, _ in known)
    if first.metric in _OF_THE_BATCH or "samples" in first.scope.split("+"):
        exact = False
        notes.append(_APART)
    stderr = _standard_error(known, mean, n)
    return replace(first, value=mean, stderr=stderr, n=n, exact=exact, note=_joined(notes))


def _agreed(group: Sequence[Row], notes: list[str]) -> Row:
    # a row that is missing because earlier batches differed goes on counting: later batches do not undo it
    counted = [row for row in group if row.value is not None or _DIFFERENT in row.note]
    if not counted:
        return replace(group[0], note=_joined(notes))
    values = {row.value for row in counted}
    value = counted[0].value if len(values) == 1 else None
    if value is None:
        notes.append(_DIFFERENT)
    n, exact = sum(row.n or 1 for row in counted), all(row.exact for row in counted)
    return replace(counted[0], value=value, stderr=None, n=n, exact=exact, note=_joined(notes))


def _standard_error(known: Sequence[tuple[Row, float]], mean: float, n: int) -> float | None:
    if any(row.stderr is None and (row.n or 1) > 1 for row, _ in known):
        return None
    squares = 0.0
    for row, value in known:
        count = row.n or 1
        squares += (row.stderr or 0.0) ** 2 * count * (count - 1) + count * (value - mean) ** 2
    return math.sqrt(squares / (n * (n - 1)))


def _joined(notes: Iterable[str]) -> str:
    said = ""
    for note in notes:
        if note not in said:  # pooled once more, it stays said once
            said = f"{said}; {note}" if said else note
    return said
