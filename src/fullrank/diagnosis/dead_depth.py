"""Dead depth: blocks that hand on what they were given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.layer_runs import layer_words, runs
from fullrank.diagnosis.thresholds import effect_limits, threshold
from fullrank.report.verdict import Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    said: list[str] = []
    for stack in evidence.stacks:
        updates = _course(evidence, "update_share", stack)
        rounding = [layer for layer in updates if evidence.at_floor(stack, layer)]
        change = {
            layer: _change(evidence, stack, row, sure=False) for layer, row in updates.items() if layer not in rounding
        }
        if not change:
            continue
        dead = [layer for layer in change if _change(evidence, stack, updates[layer]) < _limit()]
        if dead:
            suspicions += _suspected(evidence, stack, change, dead, _blocks(evidence, stack, updates))
        least = min(change, key=lambda layer: change[layer])
        left_out = f"; {layer_words(rounding)} left out, at the float floor" if rounding else ""
        said.append(
            f"{stack}: every block changes the stream by {_percent(change[least])} or more (block {least}; limit "
            f"{_percent(_limit())}){left_out}"
        )
    if suspicions:
        return Looked(tuple(suspicions))
    if not said:
        return Looked(unchecked="needs a block that gives a state of the shape it was given, above the float floor.")
    return Looked(clear=f"{'; '.join(said)}.")


def _limit() -> float:
    return threshold("dead-depth.update_share")


def _blocks(evidence: Evidence, stack: str, updates: Mapping[int, Row]) -> int:
    return int(evidence.stacks[stack].get("blocks") or max(updates))


def _course(evidence: Evidence, metric: str, stack: str, **where: str) -> dict[int, Row]:
    return evidence.course(metric, stack, site="stream", part="out", **where)


def _change(evidence: Evidence, stack: str, row: Row, *, sure: bool = True) -> float:
    """By how much of its size a block changes the stream (or its direction); `sure` adds two standard errors."""
    assert row.value is not None
    share = row.value + (2 * (row.stderr or 0.0) if sure else 0.0)
    cosine = _course(evidence, "neighbour_cosine", stack).get(row.layer)
    if cosine is not None and cosine.value is not None:
        lower = max(-1.0, cosine.value - (2 * (cosine.stderr or 0.0) if sure else 0.0))
        share = min(share, math.sqrt(max(0.0, 1 - lower**2)) if lower > 0 else 1.0)
    # One huge token (a sink) is most of ‖X‖ and hardly changes: the share is put up by how much larger the whole stream
    # is than that without the first tokens, as if only the others had changed.
    whole = _course(evidence, "rms", stack, scope="all").get(row.layer - 1)
    for scope in ("late", "no-first"):
        others = _course(evidence, "rms", stack, scope=scope).get(row.layer - 1)
        if whole is not None and whole.value and others is not None and others.value:
            return share * max(1.0, whole.value / others.value)
    return share


def _suspected(
    evidence: Evidence, stack: str, change: Mapping[int, float], dead: list[int], depth: int
) -> list[Suspicion]:
    """One of each run of blocks, or one of all of them where they are a good part of the stack."""
    many = len(dead) >= threshold("dead-depth.blocks") * depth
    severity = Severity.FAIL if many else Severity.WARN
    if evidence.weights == "unknown" and not all(_wrote_once(evidence, stack, block) for block in dead):
        severity = Severity.NOTE  # weights that may be fresh, in blocks that may be meant to begin with nothing
    return [
        _suspicion(evidence, stack, change, blocks, depth, severity)
        for blocks in ([tuple(dead)] if many else runs(dead))
    ]


def _wrote_once(evidence: Evidence, stack: str, block: int) -> bool:
    """Whether the block changes the stream at initialisation."""
    row = _course(evidence, "update_share", stack, source="initialisation").get(block)
    return row is not None and (row.value or 0.0) > _limit()


def _suspicion(
    evidence: Evidence, stack: str, change: Mapping[int, float], blocks: tuple[int, ...], depth: int, severity: Severity
) -> Suspicion:
    largest = max(change[block] for block in blocks)
    others = [share for share in change.values() if share > _limit()]
    beside = f" (the median of the others: {_percent(statistics.median(others))})" if others else ""
    plural = len(blocks) > 1
    claim = (
        f"{stack} {layer_words(blocks, 'block')} of {depth} {'change' if plural else 'changes'} the stream by "
        f"{'at most ' if plural else ''}{_percent(largest)}{' each' if plural else ''}{beside}: "
        f"{'they do' if plural else 'it does'} next to nothing."
    )
    rows = [_course(evidence, metric, stack).get(block) for block in blocks for metric in _NUMBERS]
    together = [blocks] if plural else []
    return Suspicion(
        claim,
        stack,
        severity,
        layers=blocks,
        comparisons=tuple(evidence.compared(row) for row in rows if row is not None and row.value is not None),
        tests=tuple(_skipped(stack, group) for group in (*((block,) for block in blocks), *together)),
    )


def _skipped(stack: str, blocks: tuple[int, ...]) -> Test:
    return Test(Intervention("skip-block", stack, blocks[0], also=blocks[1:]), "no effect", effect_limits())


def _percent(share: float) -> str:
    return f"{number(100 * share)} %" if share else "0 %"


_NUMBERS = ("update_share", "neighbour_cosine")

FAILURE = Failure(
    name="dead-depth",
    title="Blocks that do nothing",
    means=(
        "A block adds so little to the residual stream that the model is the same without it. Its parameters and its "
        "time are spent for nothing. In pre-norm models the usual cause is a stream that has grown so large that late "
        "blocks, whose branches write at a fixed size, no longer turn it; a branch scale that training never raised "
        "from 0, or pruning, gives the same numbers."
    ),
    harmless=(
        "At initialisation, where branch scales may start at 0 (ReZero, LayerScale) and every block is meant to write "
        "little; so it is held against trained weights only. A small update can matter all the same: a few rare "
        "tokens, or a few channels beside large constant ones, may be all that the block is for. Only skipping it "
        "tells."
    ),
    tested=(
        "Each suspected block hands on what it was given, alone and all of them together; the change of the outcome is "
        "paired over documents. The verdict holds where its 95 % interval lies below the limit every time."
    ),
    refuted_by="Skipping the blocks raises the loss on documents of the kind that the model is for.",
    command="fullrank examine {model} --verify",
    papers=(
        "residual_scaling: LayerNorm Scaling (arXiv 2502.05795)",
        "dong: Attention is not all you need (arXiv 2103.03404)",
    ),
    valid_for="trained",
    look=_look,
)
