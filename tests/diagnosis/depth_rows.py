"""Rows over depth as examine gives them, and a tester that answers what it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fullrank.diagnosis import Evidence, Intervention
from fullrank.report.verdict import Effect
from fullrank.table import Row

FLOOR = "at the float floor of float32: differences between tokens are rounding"


def over_depth(metric: str, values: Sequence[float | None], *, start: int = 0, **options: Any) -> list[Row]:
    """One row a layer; where a value is None there is none."""
    site, part = options.pop("site", "stream"), options.pop("part", "out")
    return [
        Row("encoder", layer, site, part, metric, value, n=8, **options)
        for layer, value in enumerate(values, start)
        if value is not None
    ]


def residuals(values: Sequence[float], *, floor: Sequence[int] = (), **options: Any) -> list[Row]:
    """Residuals, those of the layers in `floor` with the note that they are rounding."""
    return [
        row
        for layer, value in enumerate(values)
        for row in over_depth("residual", [value], start=layer, note=FLOOR if layer in floor else "", **options)
    ]


def evidence(*rows: Sequence[Row], causal: bool = False, kind: str = "text", **known: Any) -> Evidence:
    """Evidence on an encoder of width 64 that read eight sequences of 32 tokens."""
    depth = max((row.layer for some in rows for row in some), default=0)
    about = {
        "model": "tiny",
        "dtype": known.pop("dtype", "float32"),
        "stacks": [{"name": "encoder", "blocks": depth, "heads": 4, "width": 64, "causal": causal}],
        "input": {"kind": kind, "sequences": 8, "tokens": 256},
        "nulls": {"encoder": {"token_energy": 0.97, "similarity": 0.0}},
    }
    return Evidence([row for some in rows for row in some], about, **({"weights": "trained"} | known))


@dataclass
class Told:
    """A tester that knows what each intervention changes, and keeps what it was asked."""

    outcome: str = "loss"
    effects: Mapping[tuple[int, ...], float | str] = field(default_factory=dict)
    otherwise: float = 0.0
    asked: list[Intervention] = field(default_factory=list)

    refused = ""

    def effect(self, intervention: Intervention) -> Effect | str:
        self.asked.append(intervention)
        change = self.effects.get((intervention.layer, *intervention.also), self.otherwise)
        if isinstance(change, str):
            return change
        return Effect(intervention.words, self.outcome, change, change - 1e-3, change + 1e-3, 8)
