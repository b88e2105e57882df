"""A number that a user takes away from a theory."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """A number to type into a configuration, or to plan by.

    Attributes:
        question: `collapse-depth`, `critical-context`, `residual-scale`, `qk-std`.
        value: None where there is none, and `says` tells why; may be infinite.
        low: lower end of its uncertainty.
        high: upper end.
        field: of the architecture, or a shorthand for several; empty where it is no setting.
        theory: where it comes from.
        says: one sentence.
    """

    question: str
    value: float | None
    low: float | None
    high: float | None
    field: str
    theory: str
    says: str
