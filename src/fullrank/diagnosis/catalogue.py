"""Every failure that is looked for."""

from __future__ import annotations

from typing import Final

from fullrank.diagnosis import (
    at_floor,
    averaging_heads,
    context_dilution,
    dead_depth,
    entropy_collapse,
    numerics,
    rank_collapse_depth,
    rank_collapse_width,
    redundant_heads,
    sinks,
    starvation,
    vanishing,
)
from fullrank.diagnosis.failure import Failure
from fullrank.errors import DiagnosisError
from fullrank.spec.grammar import close_matches

__all__ = ["FAILURES", "failure_of"]

FAILURES: Final[tuple[Failure, ...]] = tuple(
    room.FAILURE
    for room in (
        rank_collapse_depth,
        rank_collapse_width,
        dead_depth,
        vanishing,
        numerics,
        entropy_collapse,
        averaging_heads,
        starvation,
        redundant_heads,
        context_dilution,
        sinks,
        at_floor,
    )
)
"""In the order in which verdicts of one severity are listed."""


def failure_of(name: str) -> Failure:
    """The failure of that name.

    Returns:
        It.

    Raises:
        DiagnosisError: where there is none; it names them all.
    """
    for failure in FAILURES:
        if failure.name == name:
            return failure
    names = [failure.name for failure in FAILURES]
    raise DiagnosisError(f"{name!r} is no verdict{close_matches(name, names)}; there are {', '.join(names)}.")
