"""What each head is: pointer, mixer, average or sink, from three numbers of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.thresholds import threshold
from fullrank.table import Row

__all__ = ["LATE", "PART", "Head", "HeadKind", "Place", "heads_of", "in_words", "kind_of", "kinds"]

HeadKind = Literal["pointer", "mixer", "average", "sink"]

Place = tuple[int, int]
"""Layer and head."""

PART = "self"
LATE = "late"


@dataclass(frozen=True)
class Head:
    """What a head of self-attention does with its keys.

    Attributes:
        entropy: row of `normalized_entropy`.
        selectivity: row of `selectivity`.
        sink: row of `sink_mass`; None where it is missing.
        log_keys: log of the number of keys a query sees.
    """

    entropy: Row
    selectivity: Row
    sink: Row | None
    log_keys: float

    @property
    def sharpness(self) -> float:
        """Nats by which the rows differ from plain averages, log n − H: at most log n."""
        return max(0.0, (1 - _value(self.entropy)) * self.log_keys)

    @property
    def selective(self) -> float:
        """Selectivity in nats, without what a causal mask gives to plain averages over the late half."""
        alone = threshold("kinds.of_the_mask") if self.selectivity.scope == LATE else 0.0
        return max(0.0, _value(self.selectivity) - alone)

    @property
    def particular(self) -> float:
        """Share of the sharpness that is particular to the query, selectivity / (log n − H).

        The mean divergence of the rows from uniform ones is that from their own average row (the selectivity) plus that
        of the average row from uniform, where every query sees all keys: the share lies in [0, 1]. 1: every key is
        attended to as much as any other, by different queries. 0: all queries read the same keys. No row diverges from
        the average of m rows by more than log m, and the late half of a causal sequence has two rows for three keys:
        there the share is of the smaller of the two. Under a mask the parts do not add up exactly; what would exceed 1
        is 1.
        """
        rows = self.log_keys + (math.log(2 / 3) if self.selectivity.scope == LATE else 0.0)
        most = min(self.sharpness, rows)
        return min(1.0, self.selective / most) if most > 0 else 0.0


def heads_of(evidence: Evidence, stack: str) -> dict[Place, Head]:
    """Every head of a stack whose entropy, selectivity and number of keys are known, by layer and head.

    Args:
        evidence: rows of attention.
        stack: of the model.

    Returns:
        Heads of self-attention; a layer that reads a state at the float floor is left out. Made once for each evidence.
    """
    return evidence.once(("heads", stack, threshold("kinds.known")), lambda: _heads_of(evidence, stack))


def _heads_of(evidence: Evidence, stack: str) -> dict[Place, Head]:
    by_metric = {
        name: evidence.heads(name, stack, site="attention", part=PART)
        for name in ("normalized_entropy", "selectivity", "sink_mass", "entropy", "logit_std", "log_context_gauge")
    }
    at_floor = {layer for layer, _ in by_metric["normalized_entropy"] if evidence.at_floor(stack, layer - 1)}
    own = {
        place: _log_keys({name: rows[place] for name, rows in by_metric.items() if place in rows})
        for place in by_metric["normalized_entropy"]
    }
    usual = max((one for one in own.values() if one is not None), default=_of_the_batch(evidence))
    found = {}
    for place, row in by_metric["normalized_entropy"].items():
        log_keys = own[place] or usual
        if place in by_metric["selectivity"] and log_keys and place[0] not in at_floor:
            found[place] = Head(row, by_metric["selectivity"][place], by_metric["sink_mass"].get(place), log_keys)
    return found


def kind_of(head: Head) -> HeadKind:
    """The kind of a head.

    `average`: near-uniform rows that hardly differ, or rows that spread and are alike whatever the query. `sink`: most
    of the mass on one key, or on the same few whatever the query. `pointer`: few keys, other ones for other queries.
    `mixer`: everything between.

    Args:
        head: its numbers.

    Returns:
        Its kind.
    """
    entropy = _value(head.entropy)
    if entropy >= threshold("kinds.spread") and head.selective < threshold("kinds.selective"):
        return "average"
    if head.sink is not None and _value(head.sink) >= threshold("kinds.sink"):
        return "sink"
    if head.particular < threshold("kinds.particular"):
        return "average" if entropy >= threshold("kinds.many") else "sink"
    return "pointer" if entropy < threshold("kinds.few") else "mixer"


def kinds(evidence: Evidence) -> tuple[tuple[str, int, int, HeadKind], ...]:
    """Stack, layer, head and kind of every head of self-attention whose numbers are known."""
    return tuple(
        (stack, layer, index, kind_of(head))
        for stack in evidence.stacks
        for (layer, index), head in heads_of(evidence, stack).items()
    )


def in_words(places: Iterable[Place], *, most: int = 4) -> str:
    """Heads in a sentence: `heads 0, 3 of layer 2; head 1 of layer 4`, and how many layers more."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(places):
        by_layer.setdefault(layer, []).append(head)
    said = [f"head{'s' if len(of) > 1 else ''} {_listed(of)} of layer {layer}" for layer, of in by_layer.items()]
    rest = f"; and heads of {len(said) - most} more layers" if len(said) > most else ""
    return "; ".join(said[:most]) + rest


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 3 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _value(row: Row) -> float:
    return float(row.value) if row.value is not None else math.nan


def _log_keys(rows: dict[str, Row]) -> float | None:
    """From entropy in nats over the same as a share; where that is 0 over 0, from the logits."""
    share = _value(rows["normalized_entropy"])
    if "entropy" in rows and share > threshold("kinds.known"):
        return _value(rows["entropy"]) / share
    if {"logit_std", "log_context_gauge"} <= set(rows) and _value(rows["log_context_gauge"]) > 0:
        return (_value(rows["logit_std"]) / _value(rows["log_context_gauge"])) ** 2
    return None


def _of_the_batch(evidence: Evidence) -> float | None:
    told = evidence.about.get("input") or {}
    tokens, sequences = told.get("tokens"), told.get("sequences")
    return math.log(tokens / sequences) if tokens and sequences and tokens > sequences else None
