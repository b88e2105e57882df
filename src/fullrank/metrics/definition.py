"""What a reader must know to read a number."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Definition", "Invariance", "Level"]

Level = Literal["token", "batch", "sample", "attention", "gradient", "weight", "output"]
"""What a number is of: the tokens of one sequence, several sequences together, any set of vectors, one call, what a
backward brings, parameters, what the model returns."""

Invariance = Literal["token_permutation", "rotation", "scale"]
"""What changes nothing: relabelling the tokens (queries and keys together, mask included), rotating their vectors,
multiplying them by a positive number."""


@dataclass(frozen=True)
class Definition:
    """One entry of the vocabulary, in words fit to be shown beside the number.

    Attributes:
        name: as it stands in the table.
        definition: plain words and the formula.
        unit: of the value.
        range: lowest and highest possible value, whatever the sizes.
        healthy: where a signal that survives lies.
        collapsed: the other end.
        null: what it gives when there is nothing to see.
        source: the work that introduced or uses it.
        level: what the number is of.
        per_head: whether each attention head has its own.
        cost: operations, for T tokens of width d (S keys, H heads).
        invariances: what changes nothing.
    """

    name: str
    definition: str
    unit: str
    range: tuple[float, float]
    healthy: str
    collapsed: str
    null: str
    source: str
    level: Level
    per_head: bool
    cost: str
    invariances: frozenset[Invariance]
