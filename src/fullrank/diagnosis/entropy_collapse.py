"""Entropy collapse: a softmax so sharp that it is frozen, without the query saying where it points."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.kinds import PART, Head, Place, heads_of, in_words
from fullrank.diagnosis.sure import above, below
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.table import Row

__all__ = ["FAILURE"]

NAME = "entropy-collapse"


@dataclass(frozen=True)
class _Frozen:
    """What shows that a head's softmax no longer moves: its logits, or what is left of its queries' gradient.

    Attributes:
        logits: beyond their limit, and far beyond their initialisation where that is known.
        gradient: beyond its limit.
        exceeded: whether one of the two was held against the initialisation, or of fresh weights against the dtype.
    """

    logits: Row | None
    gradient: Comparison | None
    exceeded: bool

    @property
    def shown(self) -> bool:
        """Whether anything shows it."""
        return self.logits is not None or self.gradient is not None


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    sharp = pointers = seen = 0
    unseen: list[Place] = []
    for stack in evidence.stacks:
        heads = heads_of(evidence, stack)
        seen += len(heads)
        logits = evidence.heads("logit_std", stack, site="attention", part=PART)
        gradients = _gradients(evidence, stack)
        frozen = {place: _frozen(evidence, logits.get(place), gradients.get(place)) for place in heads}
        resting = _resting(evidence, stack, heads, frozen)
        found: dict[Place, _Frozen] = {}
        for place, head in heads.items():
            if not below(head.entropy, threshold(f"{NAME}.entropy")):
                continue
            sharp += 1
            purposeful = head.particular >= threshold(f"{NAME}.pointer") or place in resting
            if purposeful and not (place in logits and above(logits[place], threshold(f"{NAME}.whatever"))):
                pointers += 1
                continue
            if place not in logits and place not in gradients:
                unseen.append(place)
                continue
            if frozen[place].shown:
                found[place] = frozen[place]
        layers = sorted({layer for layer, _ in found})
        suspicions += [_suspicion(evidence, stack, layer, heads, found) for layer in layers]
    if suspicions:
        return Looked(tuple(suspicions))
    if not seen:
        return Looked(unchecked="no head's entropy and selectivity were seen above the float floor.")
    if unseen:
        why = "neither their logits nor the gradients of their queries were seen: needs gradients (--gradients)"
        return Looked(unchecked=f"{in_words(unseen)} have almost no entropy and are no pointers, but {why}.")
    if not sharp:
        limit = threshold(f"{NAME}.entropy")
        return Looked(clear=f"none of {seen} heads has less than {limit:.2g} of the largest entropy.")
    return Looked(
        clear=f"{sharp} of {seen} heads have almost no entropy: {pointers} point each query to its own key or rest on "
        "a sink, and no other has logits or a query gradient that are out of bounds."
    )


def _resting(
    evidence: Evidence, stack: str, heads: dict[Place, Head], frozen: dict[Place, _Frozen]
) -> frozenset[Place]:
    """Heads that rest on a sink: on the first token, or where others do that are not frozen.

    A delimiter is such a key, wherever it stands: heads that rest on it rest on the same key in each sequence, so that
    their usual positions are equal. Frozen heads do not vouch for each other.

    Args:
        evidence: rows.
        stack: of the model.
        heads: of the stack.
        frozen: what shows of each that it is.

    Returns:
        Those whose one key is a sink of the stack; of a head that is alone on its key logits and gradient decide.
    """
    positions = {
        place: row.value
        for place, row in evidence.heads("sink_position", stack, site="attention", part=PART).items()
        if place in heads
        and (sink := heads[place].sink) is not None
        and sink.value is not None
        and sink.value >= threshold("kinds.sink")
    }
    healthy = Counter(position for place, position in positions.items() if not frozen[place].shown)
    sinks = {0.0} | {position for position, of in healthy.items() if of >= threshold(f"{NAME}.resting")}
    return frozenset(place for place, position in positions.items() if position in sinks)


def _gradients(evidence: Evidence, stack: str) -> dict[Place, Comparison]:
    """Gradient of each head's queries over that of its values, beside the same at initialisation."""
    found = {}
    queries = evidence.heads("gradient_rms", stack, site="gradient", part=f"{PART}.q")
    values = evidence.heads("gradient_rms", stack, site="gradient", part=f"{PART}.v")
    for place, q in queries.items():
        v = values.get(place)
        if v is None or not v.value or q.value is None:
            continue
        where = f"{stack} layer {place[0]}, head {place[1]}, queries over values"
        q_0, v_0 = evidence.initial(q), evidence.initial(v)
        if evidence.weights == "fresh" or q_0 is None or v_0 is None or not q_0.value or not v_0.value:
            found[place] = Comparison("gradient_rms", where, q.value / v.value)
        else:
            initial = q_0.value / v_0.value
            found[place] = Comparison("gradient_rms", where, q.value / v.value, None, "initialisation", initial)
    return found


def _frozen(evidence: Evidence, logits: Row | None, gradient: Comparison | None) -> _Frozen:
    risen, exceeded = logits is not None and above(logits, threshold(f"{NAME}.logit_std")), False
    if risen and logits is not None and evidence.weights != "fresh":
        initial = evidence.initial(logits)
        if initial is not None and initial.value:
            risen = exceeded = above(logits, threshold(f"{NAME}.rise") * initial.value)
    usual = None if gradient is None else gradient.expected or threshold(f"{NAME}.usual_gradient")
    gone = gradient is not None and gradient.value < threshold(f"{NAME}.gradient") * (usual or 0.0)
    if gone and gradient is not None:
        rounding = evidence.weights == "fresh" and gradient.value < _eps(evidence.dtype)
        exceeded = exceeded or gradient.expected is not None or rounding
    return _Frozen(logits if risen else None, gradient if gone else None, exceeded)


def _eps(dtype: str) -> float:
    """What a dtype resolves beside 1; 0 for what is no dtype of torch."""
    found = getattr(torch, dtype, None)
    return torch.finfo(found).eps if isinstance(found, torch.dtype) and found.is_floating_point else 0.0


def _suspicion(
    evidence: Evidence, stack: str, layer: int, heads: dict[Place, Head], found: dict[Place, _Frozen]
) -> Suspicion:
    inside = [place for place in found if place[0] == layer]
    all_of = Counter(of for of, _ in heads)[layer]
    first = heads[inside[0]]
    entropies = [float(heads[place].entropy.value or 0) for place in inside]
    # frozen on one key, not on two or three: those are a choice, whatever share of log n their selectivity is
    alike = all(heads[place].selective < threshold("kinds.selective") for place in inside)
    # rows that are alike are their own mean: replacing them changes nothing whatever the head is worth
    silent = Intervention("mean-head", stack, layer, tuple(head for _, head in inside))
    comparisons = []
    for place in inside[:4]:
        head, frozen = heads[place], found[place]
        rows = (head.entropy, head.selectivity, *([frozen.logits] if frozen.logits else []))
        comparisons += [evidence.compared(row) for row in rows]
        comparisons += [frozen.gradient] if frozen.gradient else []
    of_log = f" of at most {first.log_keys:.2g}"
    selectivity = max(float(heads[place].selectivity.value or 0) for place in inside)
    claim = (
        f"{len(inside)} of {all_of} heads of {stack} layer {layer} are frozen ({in_words(inside)}): entropy at most "
        f"{max(entropies):.2g} of the largest, rows that differ by no more than {selectivity:.2g} nats{of_log}, "
        f"{_because(evidence, [found[place] for place in inside])}."
    )
    return Suspicion(
        claim=claim,
        stack=stack,
        severity=Severity.FAIL if alike and len(inside) >= threshold(f"{NAME}.share") * all_of else Severity.WARN,
        layers=(layer,),
        heads=tuple(inside),
        comparisons=tuple(comparisons),
        tests=(Test(silent, "told"),),
        exceeded=all(found[place].exceeded for place in inside),
    )


def _because(evidence: Evidence, frozen: list[_Frozen]) -> str:
    said = []
    rows = [one.logits for one in frozen if one.logits is not None]
    if rows:
        row = min(rows, key=lambda row: float(row.value or 0))
        initial = evidence.initial(row)
        before = "" if initial is None or evidence.weights == "fresh" else f" ({initial.value:.2g} at initialisation)"
        said.append(f"and logits of standard deviation {row.value:.3g} or more{before}")
    gone = [one.gradient for one in frozen if one.gradient is not None]
    if gone:
        most = max(gone, key=lambda one: one.value)
        before = f" ({most.expected:.2g} at initialisation)" if most.expected else ""
        said.append(f"and queries whose gradient is at most {most.value:.2g} of the values'{before}")
    return ", ".join(said)


FAILURE = Failure(
    name=NAME,
    title="Attention frozen on a few keys",
    means=(
        "The logits have grown so large that the softmax of a row is one key to many digits. Such a row hardly "
        "changes when queries and keys change: their gradients vanish, and what the head looks at is decided once "
        "and for all. Low entropy alone does not show it: a head that points each query to a key of its own (the "
        "previous token, itself) has no entropy and is healthy. The verdict asks for three things together: entropy "
        "near 0, rows that do not point each query to its own key (low selectivity), and logits far beyond those of "
        "the initialisation or queries that no longer get a gradient. In training it comes with spikes of the loss."
    ),
    harmless=(
        "A head that rests on the first token or on a delimiter does nothing on purpose; that is a sink, whose "
        "logits stay moderate: heads are spared that rest on the first token, or on a key on which others rest that "
        "are not frozen. A pointer may have logits of a few tens: the pretrained encoder has one of standard "
        "deviation 20. In a model that is not trained any further, a frozen head that still points somewhere useful "
        "costs nothing."
    ),
    tested=(
        "The heads are replaced by the mean of what they write. The effect says what they are worth, and decides "
        "nothing: rows that are alike are their own mean, and a frozen choice of various keys can be a useful one that "
        "cannot be learned any more. The verdict rests on logits or gradients against the initialisation (of fresh "
        "weights, on gradients that are rounding beside the values'); without these it is a note."
    ),
    refuted_by=(
        "The queries of these heads get a gradient of the usual size (--gradients); or the logits were as large when "
        "training began and the loss fell since; or the heads point each query to its own key on other text."
    ),
    command="fullrank examine {model} --gradients --verify",
    papers=(
        "entropy: Stabilizing Transformer Training by Preventing Attention Entropy Collapse (arXiv 2303.06296)",
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
    ),
    valid_for="any",
    look=_look,
)
