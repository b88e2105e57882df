"""Averaging heads: after training, most heads of several layers still read all keys alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.kinds import Head, Place, heads_of, in_words
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sure import above, at_least, at_most, margin
from fullrank.diagnosis.thresholds import effect_limits, threshold
from fullrank.report.verdict import Severity
from fullrank.table import Row

__all__ = ["FAILURE"]

NAME = "averaging-heads"
_SHOWN = 12  # numbers in a verdict: two a head


def _look(evidence: Evidence) -> Looked:
    if evidence.weights == "unknown":
        return Looked(unchecked="whether the weights are trained is not known, and fresh ones only average.")
    suspicions, said = [], []
    for stack in evidence.stacks:
        heads = heads_of(evidence, stack)
        if not heads:
            continue
        averaging = [place for place, head in heads.items() if _averages(head)]
        by_layer = [tuple(place for place in averaging if place[0] == layer) for layer in _mostly(heads, averaging)]
        suspicions += [_suspicion(evidence, stack, places) for places in by_layer]
        few = f", which is common ({in_words(averaging)})" if averaging else ""
        count = f"{len(averaging)} of {len(heads)} heads"
        said.append(f"{stack}: {count} read all their keys nearly alike{few}; in no layer most of them")
    if suspicions:
        return Looked(tuple(suspicions))
    if not said:
        return Looked(unchecked="no head's entropy and selectivity were seen above the float floor.")
    return Looked(clear="; ".join(said) + ".")


def _averages(head: Head) -> bool:
    return above(head.entropy, threshold("kinds.spread")) and (
        head.selective + margin(head.selectivity) < threshold("kinds.selective")
    )


def _mostly(heads: dict[Place, Head], averaging: list[Place]) -> list[int]:
    """Layers of which most heads average."""
    of, all_of = Counter(layer for layer, _ in averaging), Counter(layer for layer, _ in heads)
    return [layer for layer in sorted(of) if of[layer] > threshold(f"{NAME}.share") * all_of[layer]]


def _suspicion(evidence: Evidence, stack: str, places: tuple[Place, ...]) -> Suspicion:
    """Of one layer."""
    layer = places[0][0]
    heads = heads_of(evidence, stack)
    mean = Intervention("mean-head", stack, layer, tuple(head for _, head in places))
    return Suspicion(
        _claim(evidence, stack, places),
        stack,
        Severity.WARN,
        layers=(layer,),
        heads=places,
        comparisons=tuple(
            evidence.compared(row) for place in places for row in (heads[place].entropy, heads[place].selectivity)
        ),
        tests=(Test(mean, "no effect", effect_limits()),),
        exceeded=all(_as_at_first(evidence, heads[place].selectivity) for place in places),
    )


def _as_at_first(evidence: Evidence, row: Row) -> bool:
    """Whether a head is no more selective than at initialisation."""
    initial = evidence.initial(row)
    return initial is not None and at_least(row) <= at_most(initial)


def _join(evidence: Evidence, parts: tuple[Suspicion, ...], refuted: tuple[Suspicion, ...]) -> tuple[Suspicion, ...]:
    """All layers that came out alike: a note where they are few, since a layer that pools is a design."""
    stack, layers = parts[0].stack, tuple(layer for part in parts for layer in part.layers)
    depth = len({layer for layer, _ in heads_of(evidence, stack)})
    several = len(layers) >= threshold(f"{NAME}.layers") and len(layers) >= threshold(f"{NAME}.depth") * depth
    places = tuple(place for part in parts for place in part.heads)
    rest = ""
    if refuted:
        others = [layer for part in refuted for layer in part.layers]
        rest = (
            f" Not so those of {layer_words(others)}, which looked alike: what they tell queries apart has an effect."
        )
    said = replace(
        parts[0],
        claim=_claim(evidence, stack, places) + rest,
        severity=parts[0].severity if several else Severity.NOTE,
        layers=layers,
        heads=places,
        comparisons=tuple(one for part in parts for one in part.comparisons)[:_SHOWN],
        tests=(),
    )
    return (said,)


def _claim(evidence: Evidence, stack: str, places: tuple[Place, ...]) -> str:
    heads = heads_of(evidence, stack)
    depth, layers = len({layer for layer, _ in heads}), len({layer for layer, _ in places})
    entropy = min((heads[place].entropy for place in places), key=lambda row: float(row.value or 0))
    initial = evidence.initial(entropy)
    before = f" ({initial.value:.3g} at initialisation)" if initial is not None else ""
    return (
        f"After training {len(places)} heads still read all their keys nearly alike, most of those in {layers} of "
        f"{depth} layers of {stack}: {in_words(places)}; the least even has {entropy.value:.3g} of the largest "
        f"entropy{before}, and none differs by {threshold('kinds.selective'):.2g} nats from one query to another."
    )


FAILURE = Failure(
    name=NAME,
    title="Heads that only average",
    means=(
        "A head whose rows are nearly uniform, and nearly the same for every query, adds the mean of its values to "
        "every token: it tells no token anything that its neighbours are not told too. At initialisation every head "
        "of a GPT-2 or a Llama is like that, and such a model trains. After training it means that the head has "
        "found nothing to look for. A few such heads are common; where most heads of several layers are, attention "
        "mixes tokens without choosing among them, which draws them together from layer to layer, and the weights of "
        "queries and keys are of no use there."
    ),
    harmless=(
        "In fresh weights always. In trained ones where they are few; where the task asks for a bag of tokens (a "
        "mean is the right answer); in the first layers of models without position in the values; on random tokens, "
        "which give a trained head nothing to look for: examine it on text of its own kind."
    ),
    tested=(
        "The heads that average are replaced by the mean of what they write, over the tokens of a sequence (over what "
        "each query has seen, where attention is causal), a layer at a time. Where they only average, that changes "
        "nothing; where it does change the loss, their small differences matter and that layer is left out."
    ),
    refuted_by=(
        "Replacing the heads by their means moves the loss; or they are selective on other text (pass a batch of the "
        "model's own kind) or in a longer context."
    ),
    command="fullrank examine {model} --verify",
    papers=(
        "entropy: Entropy-Guided Attention for Private LLMs (arXiv 2501.03489)",
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
        "oversmoothing_fixes: Anti-Oversmoothing in Deep Vision Transformers (arXiv 2203.05962)",
    ),
    valid_for="trained",
    needs_structure=True,
    look=_look,
    join=_join,
)
