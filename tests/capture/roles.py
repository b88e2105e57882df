"""What the names of every family say of its weights, read from `roles.txt`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Expected:
    """One weight, as its name and the documented layout of the family say."""

    parameter: str
    rows: tuple[int, ...] | None
    transposed: bool
    beside: tuple[str, ...]


_WEIGHT = re.compile(r"(?P<name>[^\[\]!^+]+)(?P<raw>!)?(?:\[(?P<rows>[^\]]*)\])?(?P<turned>\^)?(?:\+(?P<beside>.+))?")


def _groups(text: str) -> list[tuple[list[str], dict[str, str]]]:
    found: list[tuple[list[str], dict[str, str]]] = []
    naming = False
    for token in (token for line in text.splitlines() if not line.startswith("#") for token in line.split()):
        part, equals, weight = token.partition("=")
        if equals:
            found[-1][1][part] = weight
        elif token != "-":
            if not naming:
                found.append(([], {}))
            found[-1][0].append(token)
        naming = not equals and token != "-"
    return found


def _read(text: str) -> Expected:
    match = _WEIGHT.fullmatch(text)
    assert match is not None, text
    rows = None
    if match["rows"]:
        runs = [tuple(map(int, run.split(":"))) for run in match["rows"].split(",")]
        rows = tuple(number for run in runs for number in range(*run))
    beside = tuple(f"{name}.weight" for name in match["beside"].split("+")) if match["beside"] else ()
    return Expected(match["name"] + ("" if match["raw"] else ".weight"), rows, bool(match["turned"]), beside)


_BLOCKS, _ENDS = Path(__file__).with_name("roles.txt").read_text(encoding="utf-8").split("# ends\n")

ROLES: dict[tuple[str, str], dict[int, dict[str, Expected]]] = {}
for _keys, _parts in _groups(_BLOCKS):
    for _key in _keys:
        _family, _stack, *_layer = _key.split("/")
        _layers = ROLES.setdefault((_family, _stack), {})
        _layers[int(_layer[0]) if _layer else 1] = {part: _read(weight) for part, weight in _parts.items()}

ENDS: dict[tuple[str, str], dict[str, str | None]] = {
    (key.split("/")[0], key.split("/")[1]): {part: None if name == "-" else name for part, name in parts.items()}
    for keys, parts in _groups(_ENDS)
    for key in keys
}
