"""What a theory assumes, and how well an architecture meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from fullrank.architecture import Architecture

__all__ = ["Assumption"]


@dataclass(frozen=True)
class Assumption:
    """One sentence, and how well it holds.

    Attributes:
        says: what is assumed: `the MLP is linear`.
        degree: from 1, holds wholly, down to 0, does not hold: then the theory says nothing of the architecture.
        otherwise: what is said where it does not, with the architecture's fields in braces: `its MLP is {activation}`.
    """

    says: str
    degree: Callable[[Architecture], float]
    otherwise: str

    def reason(self, architecture: Architecture) -> str:
        """`otherwise`, filled in."""
        return self.otherwise.format_map(asdict(architecture))
