"""Layers that follow each other, and how they are said."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["layer_words", "runs"]


def runs(layers: Iterable[int]) -> list[tuple[int, ...]]:
    """Layers cut where one is missing between them: 2, 3, 6 → (2, 3), (6,)."""
    found: list[tuple[int, ...]] = []
    for layer in sorted(set(layers)):
        if found and found[-1][-1] == layer - 1:
            found[-1] = (*found[-1], layer)
        else:
            found.append((layer,))
    return found


def layer_words(layers: Iterable[int], word: str = "layer") -> str:
    """For a sentence: `layer 3`, `layers 3–5 and 8`."""
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs(layers)]
    plural = len(ranges) > 1 or "–" in ranges[0]
    said = ranges[0] if len(ranges) == 1 else f"{', '.join(ranges[:-1])} and {ranges[-1]}"
    return f"{word}{'s' if plural else ''} {said}"
