"""Keys that attention rests on, and the massive activations that such a key holds."""

from __future__ import annotations

import math

from fullrank.diagnosis.dtype_range import largest_number
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.kinds import PART, Place, heads_of
from fullrank.diagnosis.sure import above
from fullrank.diagnosis.thresholds import threshold
from fullrank.table import Row

__all__ = ["massive_at_sinks", "massive_beyond", "sink_positions", "sinks_of"]


def sinks_of(evidence: Evidence, stack: str) -> dict[Place, Row]:
    """`sink_mass` of the heads that rest on one key, by layer and head."""
    heads, found = heads_of(evidence, stack), {}
    for place, row in evidence.heads("sink_mass", stack, site="attention", part=PART).items():
        if place not in heads:
            continue
        uniform = math.exp(-heads[place].log_keys)
        if above(row, max(threshold("sinks.mass"), threshold("sinks.over_uniform") * uniform)):
            found[place] = row
    return found


def sink_positions(evidence: Evidence, stack: str) -> dict[Place, int]:
    """Where the heads of `sinks_of` rest, of those of which that is known."""
    rows = evidence.heads("sink_position", stack, site="attention", part=PART)
    return {place: int(rows[place].value or 0) for place in sinks_of(evidence, stack) if place in rows}


def massive_at_sinks(evidence: Evidence, stack: str) -> dict[int, Row]:
    """`max_abs` of the layers whose largest entry is massive and stands in the state of a key that is a sink."""
    keys = set(sink_positions(evidence, stack).values())
    if not keys:
        return {}
    sizes, places, ratios = (
        evidence.course(metric, stack, site="stream", part="out")
        for metric in ("max_abs", "max_abs_position", "max_to_median")
    )
    return {
        layer: size
        for layer, size in sizes.items()
        if layer in places
        and places[layer].value in keys
        and layer in ratios
        and above(ratios[layer], threshold("sinks.massive"))
    }


def massive_beyond(evidence: Evidence, stack: str, dtype: str) -> dict[int, Row]:
    """Those of `massive_at_sinks` that a dtype cannot hold: `sinks` tells of them, and `numerics` of all others."""
    limit = largest_number(dtype)
    return {layer: row for layer, row in massive_at_sinks(evidence, stack).items() if (row.value or 0.0) > limit}
