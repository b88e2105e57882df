"""Golden numbers of the papers: one data file, read here, with each number's own tolerance."""

import functools
import tomllib
from pathlib import Path
from typing import Any

import torch


@functools.cache
def _all() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("golden.toml").read_text(encoding="utf-8")
    return {entry["id"]: entry for entry in tomllib.loads(text)["golden"]}


def names() -> list[str]:
    """Of all entries."""
    return list(_all())


def golden(name: str) -> dict[str, Any]:
    """The entry: setting, quantity, expected, tolerance, kind."""
    return _all()[name]


def assert_golden(name: str, found: Any) -> None:
    """The found numbers agree with the entry's expectation within the entry's own tolerance."""
    entry = golden(name)
    expected = torch.as_tensor(entry["expected"], dtype=torch.float64)
    seen = torch.as_tensor(found, dtype=torch.float64)
    assert seen.shape == expected.shape, f"{name}: shape {tuple(seen.shape)}, expected {tuple(expected.shape)}"
    tolerance = entry["tolerance"]
    match entry["kind"]:
        case "relative":
            good = (seen - expected).abs() <= tolerance * expected.abs()
        case "absolute":
            good = (seen - expected).abs() <= tolerance
        case "factor":
            good = (seen >= expected / tolerance) & (seen <= expected * tolerance)
        case kind:
            raise AssertionError(f"unknown kind {kind}")
    assert bool(good.all()), (
        f"{name}: found {seen.tolist()}, expected {expected.tolist()} within {tolerance} ({entry['kind']})"
    )
