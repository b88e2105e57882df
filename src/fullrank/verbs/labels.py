"""Short names that tell several models apart: of paths and SPECs, the pieces in which they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["told_apart"]

_PIECES = re.compile(r"[/?&@]")


def told_apart(names: Sequence[str]) -> list[str]:
    """One different label for each name.

    What all names have in common, in whole pieces between `/`, `?`, `&` and `@`, is left out:
    `run/checkpoint-500/model` and `run/checkpoint-1000/model` become `checkpoint-500` and `checkpoint-1000`,
    `arch:llama?num_hidden_layers=2` and `arch:llama?num_hidden_layers=4` the option alone. Where they have nothing in
    common, this is done for those that begin alike. Where names are equal, they are numbered.

    Args:
        names: SPECs, class names, anything.

    Returns:
        As many labels, none empty, all different.
    """
    pieces = [[piece for piece in _PIECES.split(name) if piece] or [name] for name in names]
    found = _different(pieces)
    if all(len(label) == len(name) for label, name in zip(found, pieces, strict=True)):
        alike: dict[str, list[int]] = {}
        for index, one in enumerate(pieces):
            alike.setdefault(one[0], []).append(index)
        for indices in alike.values():
            for index, label in zip(indices, _different([pieces[index] for index in indices]), strict=True):
                found[index] = label
    joined = ["&".join(label) if any("=" in piece for piece in label) else "/".join(label) for label in found]
    if len(set(joined)) < len(set(names)):
        joined = list(names)
    return [
        f"{label} ({joined[:index].count(label) + 1})" if joined.count(label) > 1 else label
        for index, label in enumerate(joined)
    ]


def _different(names: Sequence[list[str]]) -> list[list[str]]:
    """The pieces in which names differ: of equally long ones wherever they stand, else between beginning and end."""
    if len(names) == 1:
        return [names[0][-1:]]
    shortest = min(map(len, names))
    if shortest == max(map(len, names)):
        differing = [place for place in range(shortest) if len({name[place] for name in names}) > 1]
        return [[name[place] for place in differing or [shortest - 1]] for name in names]
    front = back = 0
    while front < shortest - 1 and len({name[front] for name in names}) == 1:
        front += 1
    while back < shortest - 1 - front and len({name[len(name) - 1 - back] for name in names}) == 1:
        back += 1
    return [name[front : len(name) - back] for name in names]
