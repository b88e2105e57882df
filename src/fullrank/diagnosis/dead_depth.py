"""Dead depth: blocks that hand on what they were given."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sure import margin
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
        change = _changes(evidence, stack)
        if not change:
            continue
        dead = [layer for layer in change if _change(evidence, stack, updates[layer]) < _limit()]
        suspicions += [_suspicion(evidence, stack, block) for block in dead]
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


def _changes(evidence: Evidence, stack: str) -> dict[int, float]:
    """By how much each block above the floor changes the stream."""
    updates = _course(evidence, "update_share", stack)
    return {
        layer: _change(evidence, stack, row, sure=False)
        for layer, row in updates.items()
        if not evidence.at_floor(stack, layer)
    }


def _course(evidence: Evidence, metric: str, stack: str, **where: str) -> dict[int, Row]:
    return evidence.course(metric, stack, site="stream", part="out", **where)


def _change(evidence: Evidence, stack: str, row: Row, *, sure: bool = True) -> float:
    """By how much of its size a block changes the stream (or its direction); `sure` adds what it may be off by."""
    assert row.value is not None
    share = row.value + (margin(row) if sure else 0.0)
    cosine = _course(evidence, "neighbour_cosine", stack).get(row.layer)
    if cosine is not None and cosine.value is not None:
        lower = max(-1.0, cosine.value - (margin(cosine) if sure else 0.0))
        share = min(share, math.sqrt(max(0.0, 1 - lower**2)) if lower > 0 else 1.0)
    # One huge token (a sink) is most of ‖X‖ and hardly changes: the share is put up by how much larger the whole stream
    # is than that without the first tokens, as if only the others had changed.
    whole = _course(evidence, "rms", stack, scope="all").get(row.layer - 1)
    for scope in ("late", "no-first"):
        others = _course(evidence, "rms", stack, scope=scope).get(row.layer - 1)
        if whole is not None and whole.value and others is not None and others.value:
            return share * max(1.0, whole.value / others.value)
    return share


def _wrote_once(evidence: Evidence, stack: str, block: int) -> bool:
    """Whether the block changes the stream at initialisation."""
    row = _course(evidence, "update_share", stack, source="initialisation").get(block)
    return row is not None and (row.value or 0.0) > _limit()


def _suspicion(evidence: Evidence, stack: str, block: int) -> Suspicion:
    once = _wrote_once(evidence, stack, block)
    # weights that may be fresh, in a block that may be meant to begin with nothing: another draw says little of it
    severity = Severity.NOTE if evidence.weights == "unknown" else Severity.WARN
    rows = [_course(evidence, metric, stack).get(block) for metric in _NUMBERS]
    return Suspicion(
        _claim(evidence, stack, (block,), "it does next to nothing"),
        stack,
        severity,
        layers=(block,),
        comparisons=tuple(evidence.compared(row) for row in rows if row is not None and row.value is not None),
        tests=(_skipped(stack, (block,)),),
        exceeded=once,
    )


def _join(evidence: Evidence, parts: tuple[Suspicion, ...], refuted: tuple[Suspicion, ...]) -> tuple[Suspicion, ...]:
    """All blocks that came out alike: together, where that was tested, a failure if they are many; else one by one."""
    first, blocks = parts[0], tuple(layer for part in parts for layer in part.layers)
    many = len(blocks) >= threshold("dead-depth.blocks") * _depth(evidence, first.stack)
    grave = Severity.FAIL if many and first.severity is not Severity.NOTE else first.severity
    comparisons = tuple(one for part in parts for one in part.comparisons)
    rest = ""
    if refuted:
        others = layer_words([layer for part in refuted for layer in part.layers], "block")
        rest = f" Not so {others}, which looked alike: skipping {'them' if len(refuted) > 1 else 'it'} has an effect."

    def said(words: str) -> Suspicion:
        claim = _claim(evidence, first.stack, blocks, words) + rest
        return replace(first, claim=claim, layers=blocks, comparisons=comparisons, tests=())

    if len(parts) == 1:
        return (replace(said("it does next to nothing"), severity=grave),)
    each = said("each of them does next to nothing")
    if first.severity is Severity.NOTE:
        return (each,)
    together = replace(
        said("alone and together they do next to nothing"),
        severity=grave,
        tests=(_skipped(first.stack, blocks),),
        exceeded=False,  # nothing but the joint test says what they are together
    )
    return together, each


def _depth(evidence: Evidence, stack: str) -> int:
    return int(evidence.stacks[stack].get("blocks") or max(_course(evidence, "update_share", stack)))


def _claim(evidence: Evidence, stack: str, blocks: tuple[int, ...], words: str) -> str:
    change, plural = _changes(evidence, stack), len(blocks) > 1
    others = [share for share in change.values() if share > _limit()]
    beside = f" (the median of the others: {_percent(statistics.median(others))})" if others else ""
    return (
        f"{stack} {layer_words(blocks, 'block')} of {_depth(evidence, stack)} {'change' if plural else 'changes'} the "
        f"stream by {'at most ' if plural else ''}{_percent(max(change[block] for block in blocks))}"
        f"{' each' if plural else ''}{beside}: {words}."
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
        "Each suspected block hands on what it was given, and all of those that nothing misses together; the change of "
        "the outcome is paired over documents. A block counts where the 95 % interval lies below the limit; one that "
        "is missed is left out. A third of the stack or more is a failure where they are not missed together either."
    ),
    refuted_by="Skipping the blocks raises the loss on documents of the kind that the model is for.",
    command="fullrank examine {model} --verify",
    papers=(
        "residual_scaling: LayerNorm Scaling (arXiv 2502.05795)",
        "dong: Attention is not all you need (arXiv 2103.03404)",
    ),
    valid_for="trained",
    needs_structure=True,
    look=_look,
    join=_join,
)
