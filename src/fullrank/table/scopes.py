"""The context in a scope: how `late+context=1024` is written, and read again."""

from __future__ import annotations

__all__ = ["context_of", "in_context", "without_context"]

_MARK = "+context="


def in_context(scope: str, context: int) -> str:
    """The scope of a number taken at one context: its own parts, then the context."""
    return f"{scope}{_MARK}{context}"


def without_context(scope: str) -> tuple[str, int | None]:
    """A scope's own parts and its context: `late+context=1024` → `late`, 1024; None where it says none."""
    own, mark, context = scope.rpartition(_MARK)
    return (own, int(context)) if mark and context.isdecimal() else (scope, None)


def context_of(scope: str) -> int | None:
    """The context in a scope; None where it says none."""
    return without_context(scope)[1]
