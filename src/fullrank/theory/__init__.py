"""What papers say of an architecture before it is trained or run: closed forms and recursions, one file per paper."""

from fullrank.theory.assumption import Assumption
from fullrank.theory.theory import Theory, theory

__all__ = ["Assumption", "Theory", "theory"]
