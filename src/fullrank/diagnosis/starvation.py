"""Query/key starvation: queries and keys that do not learn while values and output do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.kinds import PART
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.diagnosis.sure import at_least, below
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number
from fullrank.table import Row

__all__ = ["FAILURE"]

NAME = "query-key-starvation"
_NEEDS = "needs gradients (gradients=True, --gradients), or weights of trained models (weights=True, --weights)"


def _look(evidence: Evidence) -> Looked:
    suspicions, said, left_out = [], [], set()
    for stack in evidence.stacks:
        ratios = evidence.course("elasticity_ratio", stack, site="gradient", part=PART)
        floor = {layer for layer in ratios if evidence.at_floor(stack, layer - 1)}
        left_out |= floor
        ratios = {layer: row for layer, row in ratios.items() if layer not in floor}
        starved = _starved(evidence, stack, ratios)
        suspicions += [one for one in (starved, _outstepped(evidence, stack, floor)) if one is not None]
        still = _untrained(evidence, stack)
        suspicions += [still] if still is not None and starved is None else []
        said += _clear(evidence, stack, ratios)
    if suspicions:
        return Looked(tuple(suspicions))
    if said:
        floor_words = f"; {layer_words(left_out)} left out, at the float floor" if left_out else ""
        return Looked(clear=f"{'; '.join(said)}{floor_words}.")
    if left_out:
        return Looked(
            unchecked=f"{layer_words(left_out)} read a state at the float floor: their gradients are rounding."
        )
    return Looked(unchecked=f"{_NEEDS}.")


# ---------------------------------------------------------------- by gradients


def _starved(evidence: Evidence, stack: str, ratios: dict[int, Row]) -> Suspicion | None:
    """Layers whose queries and keys have a far smaller say in the loss than at initialisation."""
    referenced = evidence.weights != "fresh" and any(evidence.initial(row) is not None for row in ratios.values())
    if not referenced:
        return _starved_alone(stack, ratios)
    limit = threshold(f"{NAME}.elasticity_ratio")
    found = {
        layer: row
        for layer, row in ratios.items()
        if (initial := evidence.initial(row)) is not None
        and (initial.value or 0.0) > threshold(f"{NAME}.resolved")
        and below(row, limit * at_least(initial))
    }
    if not found:
        return None
    most = max(found, key=lambda layer: float(found[layer].value or 0))
    row, initial = found[most], evidence.initial(found[most])
    before = "–" if initial is None else number(initial.value)
    claim = (
        f"Queries and keys of {stack} {layer_words(found)} have {number(row.value)} of the say in the loss that values "
        f"and output have, or less; at initialisation it was {before}."
    )
    gradients = evidence.course("query_key_to_value_output", stack, site="gradient", part=PART)
    beside = [one for layer in found if (one := gradients.get(layer)) is not None]
    return _suspected(claim, stack, found, [evidence.compared(one) for one in (*found.values(), *beside)])


def _starved_alone(stack: str, ratios: dict[int, Row]) -> Suspicion | None:
    """Without an initialisation to compare with: layers that fall far behind an earlier one of the same model.

    How large the ratio is at the first layer depends on the size and the shape of the weights alone, and is no matter
    of health; that it falls over depth is one of the signal.

    Args:
        stack: of the model.
        ratios: `elasticity_ratio` by layer.

    Returns:
        A note, or None.
    """
    limit = threshold(f"{NAME}.elasticity_ratio")
    found: dict[int, float] = {}
    best: Row | None = None
    for layer, row in sorted(ratios.items()):
        usual = 0.0 if best is None else at_least(best)
        if usual > threshold(f"{NAME}.resolved") and below(row, limit * usual):
            found[layer] = usual
        if best is None or float(row.value or 0) > float(best.value or 0):
            best = row
    if not found or best is None:
        return None
    most = max((ratios[layer] for layer in found), key=lambda row: float(row.value or 0))
    claim = (
        f"Queries and keys of {stack} {layer_words(found)} have {number(most.value)} of the say in the loss that "
        f"values and output have, or less; those of layer {best.layer} have {number(best.value)}."
    )
    compared = [
        Comparison("elasticity_ratio", f"{stack} layer {layer}", float(row.value or 0), row.stderr)
        for layer, row in ratios.items()
        if layer in found or layer == best.layer
    ]
    return _suspected(claim, stack, found, compared, Severity.NOTE)


def _outstepped(evidence: Evidence, stack: str, floor: set[int]) -> Suspicion | None:
    """Layers whose query gradients are no larger than the optimiser's epsilon, so that their steps shrink."""
    epsilon, width = evidence.epsilon, evidence.stacks[stack].get("width")
    if not epsilon or not width:
        return None
    elasticity = evidence.course("elasticity", stack, site="gradient", part="q")
    sizes = evidence.course("weight_rms", stack, site="weights", part="q")
    entries = {
        layer: float(row.value or 0) / (float(sizes[layer].value or 0) * width**2)
        for layer, row in elasticity.items()
        if row.exact and layer in sizes and sizes[layer].value and layer not in floor
    }
    found = {layer: size for layer, size in entries.items() if size < threshold(f"{NAME}.epsilon") * epsilon}
    if not found:
        return None
    most = max(found.values())
    claim = (
        f"Entries of the query gradient of {stack} {layer_words(found)} are about {number(most)} or less, and the "
        f"optimiser's epsilon is {number(epsilon)}: Adam's step is the gradient over its size plus epsilon, and falls "
        f"to {number(most / (most + epsilon))} of what it would be."
    )
    compared = [
        Comparison("gradient_norm", f"{stack} layer {layer}, entry of W_Q", size, None, "threshold", epsilon)
        for layer, size in found.items()
    ]
    return _suspected(claim, stack, found, compared)


# ---------------------------------------------------------------- by what training left of them


def _untrained(evidence: Evidence, stack: str) -> Suspicion | None:
    """Layers whose W_Q and W_K have size and norm of a fresh draw while W_V or W_O have not."""
    if evidence.weights != "trained":
        return None
    changes = {role: _changes(evidence, stack, role) for role in ("q", "k", "v", "o")}
    little, much = threshold(f"{NAME}.unmoved"), threshold(f"{NAME}.moved")
    found = [
        layer
        for layer in sorted(changes["q"])
        if all(changes[role].get(layer, 1.0) < little for role in ("q", "k"))
        and max(changes[role].get(layer, 0.0) for role in ("v", "o")) > much
    ]
    if not found:
        return None
    largest = max(changes[role][layer] for role in ("q", "k") for layer in found)
    least = min(max(changes[role].get(layer, 0.0) for role in ("v", "o")) for layer in found)
    rows = [evidence.course("spectral_norm", stack, site="weights", part=role) for role in ("q", "k", "v", "o")]
    claim = (
        f"W_Q and W_K of {stack} {layer_words(found)} have the size and the largest singular value of a fresh draw (to "
        f"{number(100 * largest)} %), while W_V or W_O have moved by {number(100 * least)} % or more: training has "
        f"left queries and keys where they started."
    )
    return _suspected(
        claim, stack, found, [evidence.compared(of[layer]) for layer in found[:4] for of in rows if layer in of]
    )


def _suspected(
    claim: str,
    stack: str,
    layers: Iterable[int],
    comparisons: Sequence[Comparison],
    severity: Severity = Severity.WARN,
) -> Suspicion:
    """A suspicion that no intervention on a forward can test; a warning rests on a reference that was exceeded."""
    exceeded = severity is not Severity.NOTE
    return Suspicion(claim, stack, severity, tuple(layers), comparisons=tuple(comparisons), exceeded=exceeded)


def _changes(evidence: Evidence, stack: str, role: str) -> dict[int, float]:
    """By how much, relative to the initialisation, a weight's size or its largest singular value differ."""
    found: dict[int, float] = {}
    for metric in ("weight_rms", "spectral_norm"):
        for layer, row in evidence.course(metric, stack, site="weights", part=role).items():
            initial = evidence.initial(row)
            if initial is not None and initial.value and row.value is not None:
                found[layer] = max(found.get(layer, 0.0), abs(row.value / initial.value - 1))
    return found


def _clear(evidence: Evidence, stack: str, ratios: dict[int, Row]) -> list[str]:
    referenced = {
        layer: row.value / initial.value
        for layer, row in ratios.items()
        if row.value is not None and (initial := evidence.initial(row)) is not None and initial.value
    }
    if referenced and evidence.weights != "fresh":
        layer = min(referenced, key=lambda layer: referenced[layer])
        return [
            f"{stack}: the say of queries and keys beside values and output is {number(ratios[layer].value)} or more, "
            f"{number(referenced[layer])} times that of the initialisation at the least (layer {layer})"
        ]
    if ratios:
        layer = min(ratios, key=lambda layer: float(ratios[layer].value or 0))
        return [
            f"{stack}: the say of queries and keys beside values and output is {number(ratios[layer].value)} or more, "
            f"and does not fall over depth (least at layer {layer})"
        ]
    changes = {role: _changes(evidence, stack, role) for role in ("q", "k")}
    if evidence.weights == "trained" and all(changes.values()):
        layer = min(changes["q"], key=lambda layer: max(of.get(layer, 0.0) for of in changes.values()))
        least = max(of.get(layer, 0.0) for of in changes.values())
        return [f"{stack}: W_Q and W_K differ from a fresh draw by {number(100 * least)} % or more (layer {layer})"]
    return []


FAILURE = Failure(
    name=NAME,
    title="Queries and keys that do not learn",
    means=(
        "The loss depends on queries and keys only through how attention differs from token to token. Where tokens "
        "have become alike, or the softmax is uniform or frozen, nothing of that is left: the gradients of W_Q and "
        "W_K fall as (1 − ρ)² with the cosine ρ between tokens, while those of W_V and W_O stay. Gradients alone "
        "depend on how large weights were drawn, so the verdict compares elasticities, size of the weight times size "
        "of its gradient, with those of the same model at initialisation. Plain gradient descent stalls there; Adam "
        "copes, until gradients reach its epsilon. Weights that still look freshly drawn while their neighbours "
        "moved tell the same afterwards."
    ),
    harmless=(
        "At default initialisation of a GPT-2 or a Llama queries and keys get 3 to 8 % of the gradient of values, "
        "and both train well. Queries and keys that were frozen on purpose (fine-tuning by parts) look the same. A "
        "model at the end of its training may need no change of its attention."
    ),
    tested=(
        "By no intervention on the forward: it is a statement on learning. It rests on gradients against the same "
        "model at its initialisation, on the optimiser's epsilon where that is given, and on the weights against a "
        "fresh draw."
    ),
    refuted_by=(
        "W_Q and W_K change over the next few hundred steps by as much, relative to their size, as W_V and W_O do."
    ),
    command="fullrank examine {model} --gradients --weights",
    papers=(
        "noci: Signal Propagation in Transformers: Theoretical Perspectives and the Role of Rank Collapse (arXiv "
        "2206.03126)",
        "giorlandino_goldt: Two failure modes of deep transformers and how to avoid them (arXiv 2505.24333)",
        "gradient_heterogeneity: Understanding Why Adam Outperforms SGD: Gradient Heterogeneity in Transformers "
        "(arXiv 2502.00213)",
    ),
    valid_for="any",
    look=_look,
)
