"""One sentence for what is the same at many places."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["joined_notes"]

_NUMBERED = re.compile(r"\b[A-Za-z_]\w*(?:\.\w+)*\.\d+(?:\.\w+)*")  # a path such as encoder.layer.3.attention


def joined_notes(notes: Iterable[str]) -> list[str]:
    """Sentences that differ in nothing but the numbers of one path become one, with the first path and the last.

    Args:
        notes: in order.

    Returns:
        Each once; `… layer.0.attention … layer.5.attention (6 of these) …` in the place of the first of those joined.
    """
    once = list(dict.fromkeys(notes))
    alike: dict[str, list[str]] = {}
    for note in once:
        alike.setdefault(_form(note), []).append(note)
    told = (_joined(note, alike[_form(note)]) for note in once)
    return list(dict.fromkeys(told))


def _form(note: str) -> str:
    if len(set(_NUMBERED.findall(note))) != 1:
        return note
    return _NUMBERED.sub(lambda path: re.sub(r"\d+", "#", path[0]), note)


def _joined(note: str, alike: list[str]) -> str:
    if len(alike) < 3:
        return note
    first, last = (_NUMBERED.findall(one)[0] for one in (alike[0], alike[-1]))
    return alike[0].replace(first, f"{first} … {last} ({len(alike)} of these)")
