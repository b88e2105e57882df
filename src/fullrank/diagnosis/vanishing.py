"""Vanishing or exploding: the signal, or the gradient, changes its size over depth by orders of magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.thresholds import threshold
from fullrank.diagnosis.unused_norms import unused_norms
from fullrank.report.verdict import Against, Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]


@dataclass(frozen=True)
class _Profile:
    """The size of something over depth, beside what is expected, as logarithms relative to one layer.

    Attributes:
        rows: by layer.
        size: log of the size over that at `base`.
        expected: the same of the reference.
        base: the layer that is 0.
        referenced: whether the reference is the model's initialisation.
        backward: whether the base is the last layer.
    """

    rows: Mapping[int, Row]
    size: Mapping[int, float]
    expected: Mapping[int, float]
    base: int
    referenced: bool
    backward: bool = False

    def excess(self, layer: int) -> float:
        """By how much a layer's size is beyond what is expected there."""
        return self.size[layer] - self.expected[layer]

    @property
    def farthest(self) -> int:
        """The layer that is most beyond."""
        return max(self.size, key=lambda layer: abs(self.excess(layer)))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Across which the size goes off: the one that has half of it, else all up to the farthest layer."""
        first, last = sorted((self.base, self.farthest))
        layers = [layer for layer in sorted(self.size) if first <= layer <= last]
        steps = {after: self.excess(after) - self.excess(before) for before, after in pairwise(layers)}
        if self.backward:
            steps = {block: -step for block, step in steps.items()}
        largest = max(steps, key=lambda block: steps[block] * math.copysign(1, self.excess(self.farthest)))
        most = abs(steps[largest]) >= abs(self.excess(self.farthest)) / 2
        return (largest,) if most else tuple(steps)


def _look(evidence: Evidence) -> Looked:
    if reason := unused_norms(evidence):
        return Looked(unchecked=reason)
    suspicions: list[Suspicion] = []
    clear: list[str] = []
    missing: set[str] = set()
    for stack in evidence.stacks:
        for what, profile in (("stream", _signal(evidence, stack)), ("gradient", _gradient(evidence, stack))):
            if profile is None:
                missing.add(what)
            elif abs(profile.excess(profile.farthest)) > math.log(threshold("vanishing-or-exploding.total")):
                suspicions.append(_suspicion(evidence, stack, what, profile))
            else:
                clear.append(_words(stack, what, profile, min(profile.size) if profile.backward else max(profile.size)))
    said = "; ".join(clear)
    if not missing and evidence.stacks:
        return Looked(tuple(suspicions), clear=f"{said}.")
    needs = "gradients (gradients=True, --gradients)" if missing == {"gradient"} else "two states of the stream"
    return Looked(tuple(suspicions), unchecked=f"needs {needs}{f'; clear so far: {said}' if said else ''}.")


def _suspicion(evidence: Evidence, stack: str, what: str, profile: _Profile) -> Suspicion:
    excess = profile.excess(profile.farthest)
    severity = Severity.FAIL if abs(excess) > math.log(threshold("vanishing-or-exploding.grave")) else Severity.WARN
    if not profile.referenced and evidence.weights != "fresh":
        severity = Severity.NOTE
    row = profile.rows[profile.farthest]
    assert row.value is not None
    against: Against = "initialisation" if profile.referenced else "null"
    where = f"{stack} layer {row.layer}"
    blocks = profile.blocks
    return Suspicion(
        f"{_words(stack, what, profile, profile.farthest)}, {number(math.exp(min(abs(excess), 690)))} times "
        f"{'more' if excess > 0 else 'less'} than {_REFERENCES[what, against]}, in {layer_words(blocks, 'block')}.",
        stack,
        severity,
        layers=blocks,
        comparisons=(Comparison(row.metric, where, row.value, row.stderr, against, row.value * _bounded(-excess)),),
    )


def _words(stack: str, what: str, profile: _Profile, layer: int) -> str:
    size, steps = profile.size[layer], abs(layer - profile.base)
    each = f"{number(_bounded(size / steps))} a layer" if steps else "one layer"
    if what == "stream":
        return f"{stack}: after layer {layer} the stream is {number(_bounded(size))} times what it was given ({each})"
    return (
        f"{stack}: a relative change of the stream after layer {layer} moves the loss {number(_bounded(size))} times "
        f"as much as one after the last layer ({each})"
    )


def _bounded(log: float) -> float:
    return math.exp(max(-690.0, min(log, 690.0)))


_REFERENCES: dict[tuple[str, Against], str] = {
    ("stream", "initialisation"): "at initialisation",
    ("gradient", "initialisation"): "at initialisation",
    ("stream", "null"): "unit branches that add up at random",
    ("gradient", "null"): "in blocks that keep it",
}


# ------------------------------------------------------------ sizes


def _signal(evidence: Evidence, stack: str) -> _Profile | None:
    """Size of the stream, relative to what the first block is given."""
    rows = _above_floor(evidence, stack, evidence.course("rms", stack, site="stream", part="out"))
    if rows and rows[min(rows)].value == 0:  # queries of a decoder of detections begin at nothing
        del rows[min(rows)]
    if drawn := _drawn(evidence, rows):
        rows = {layer: rows[layer] for layer in drawn}
    if len(rows) < 2:
        return None
    base = min(rows)
    sizes = {layer: _log(row) for layer, row in rows.items()}
    if drawn:
        return _Profile(rows, _from(sizes, base), _from(drawn, base), base, True)
    # unrelated branches of unit size add up to the root of their number, however small the embeddings are
    ceiling = {layer: max(0.0, -sizes[base]) + 0.5 * math.log1p(layer - base) for layer in rows}
    size = _from(sizes, base)
    return _Profile(rows, size, {layer: min(max(size[layer], 0.0), ceiling[layer]) for layer in rows}, base, False)


def _gradient(evidence: Evidence, stack: str) -> _Profile | None:
    """What the loss changes with a relative change of the stream, ‖X‖ ‖∂X‖, relative to the last layer."""
    # where a stream grows, every norm divides its gradient by as much: the product is free of that
    gains = _above_floor(evidence, stack, evidence.course("gradient_gain", stack, site="gradient", part="out"))
    sizes = evidence.course("rms", stack, site="stream", part="out")
    rows = {layer: row for layer, row in gains.items() if layer in sizes and sizes[layer].value}
    found = {layer: _log(row) + _log(sizes[layer]) for layer, row in rows.items()}
    if {0, 1} <= found.keys() and found[0] > found[
        1
    ]:  # a token that begins at 0, such as CLS, has a gradient beyond measure
        del rows[0], found[0]
    drawn_gains, drawn_sizes = _drawn(evidence, rows), _drawn(evidence, {layer: sizes[layer] for layer in rows})
    drawn = {layer: gain + drawn_sizes[layer] for layer, gain in drawn_gains.items() if layer in drawn_sizes}
    if drawn:
        rows, found = {layer: rows[layer] for layer in drawn}, {layer: found[layer] for layer in drawn}
    if len(rows) < 2:
        return None
    base = max(rows)
    expected = drawn or dict.fromkeys(rows, 0.0)
    return _Profile(rows, _from(found, base), _from(expected, base), base, bool(drawn), backward=True)


def _drawn(evidence: Evidence, rows: Mapping[int, Row]) -> dict[int, float]:
    """The logarithms at initialisation, of layers that are not nothing there; empty where they are no reference."""
    initial = {layer: evidence.initial(row) for layer, row in rows.items()}
    if evidence.weights == "fresh" or None in initial.values():
        return {}
    drawn = {layer: _log(row) for layer, row in initial.items() if row is not None and row.value}
    return drawn if len(drawn) > 1 else {}


def _above_floor(evidence: Evidence, stack: str, rows: Mapping[int, Row]) -> dict[int, Row]:
    return {layer: row for layer, row in rows.items() if not evidence.at_floor(stack, layer)}


def _log(row: Row | None) -> float:
    assert row is not None and row.value is not None
    return math.log(min(max(row.value, 1e-300), 1e300))


def _from(logs: Mapping[int, float], base: int) -> dict[int, float]:
    return {layer: value - logs[base] for layer, value in logs.items()}


FAILURE = Failure(
    name="vanishing-or-exploding",
    title="Signals or gradients that die out or blow up",
    means=(
        "The size of the residual stream, or the say that it has in the loss, changes by orders of magnitude from one "
        "end of the stack to the other, beyond what the same architecture does at initialisation. Blocks behind an "
        "exploding stream write beside something far larger than themselves; blocks before a vanishing gradient do not "
        "learn. Weights drawn too large or too small for a stack without norms, or single weights that ran away, "
        "are the usual causes."
    ),
    harmless=(
        "A pre-norm stream grows like the square root of depth at initialisation and some tens to a hundred times in "
        "trained decoders; its gradient falls by as much, since every norm divides by the stream's size: so gradients "
        "are taken times the stream's size. Under post-norm the size of the stream is the norm's own, and says nothing."
    ),
    tested=(
        "From the numbers alone: the size over depth is held against the same model at initialisation on the same "
        "batch; of fresh weights against the square root of depth, and gradients against blocks that keep them."
    ),
    refuted_by="The same course over depth in a model of this architecture that trains well.",
    command="fullrank examine {model} --gradients",
    papers=(
        "residual_scaling: LayerNorm Scaling (arXiv 2502.05795)",
        "cowsik: Geometric Dynamics of Signal Propagation Predict Trainability of Transformers (arXiv 2403.02579)",
        "deepscalelm: Transformers Get Stable (arXiv 2403.09635)",
    ),
    valid_for="any",
    look=_look,
)
