"""Where in a block a number was taken: which rows are one place over depth, and the place in words."""

from __future__ import annotations

import re

from fullrank.table import Row

__all__ = ["place_of", "place_words"]


def place_of(row: Row) -> tuple[str, str]:
    """Site and part; tensors that are called alike in all layers are one place, so that it has a course over depth."""
    alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.part) if row.site in ("gradient", "weights") else row.part
    return row.site, alike


def place_words(site: str, part: str) -> str:
    """Where in a block a number was taken, such as `block output`."""
    match site, part:
        case "stream", "out":
            return "block output"
        case "stream", "mid":
            return "between attention and MLP"
        case "read", "out":
            return "read by attention (after the norm)"
        case "read", "mid":
            return "read by the MLP (after the norm)"
        case "gradient", "out" | "mid":
            return f"gradient at {place_words('stream', part)}" if part == "out" else "gradient between the two"
    return part if site in ("attention", "gradient", "weights") else f"{site} {part}"
