"""Short names that tell several models apart: of paths and SPECs, the pieces in which they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["told_apart"]

_PIECES = re.compile(r"[/?&@]")


def told_apart(names: Sequence[str]) -> list[str]:
    """One different label for each name.

    What all names have in common at their beginning and end, in whole pieces between `/`, `?`, `&` and `@`, is left
    out: `run/checkpoint-500/model` and `run/checkpoint-1000/model` become `checkpoint-500` and `checkpoint-1000`,
    `arch:llama?num_hidden_layers=2` and `arch:llama?num_hidden_layers=4` the option alone. Where names are equal, they
    are numbered.

    Args:
        names: SPECs, class names, anything.

    Returns:
        As many labels, none empty, all different.
    """
    pieces = [[piece for piece in _PIECES.split(name) if piece] or [name] for name in names]
    if len(names) > 1:
        shortest = min(map(len, pieces))
        front = 0
        while front < shortest - 1 and len({one[front] for one in pieces}) == 1:
            front += 1
        back = 0
        while back < shortest - 1 - front and len({one[len(one) - 1 - back] for one in pieces}) == 1:
            back += 1
        short = ["/".join(one[front : len(one) - back]) for one in pieces]
    else:
        short = [one[-1] for one in pieces]
    found = short if len(set(short)) == len(set(names)) else list(names)
    return [
        f"{label} ({found[:index].count(label) + 1})" if found.count(label) > 1 else label
        for index, label in enumerate(found)
    ]
