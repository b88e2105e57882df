"""At the floor: layers whose tokens differ by rounding alone."""

from __future__ import annotations

import torch

from fullrank import metrics
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion
from fullrank.diagnosis.layer_runs import layer_words
from fullrank.report.verdict import Comparison, Severity
from fullrank.report.wording import number

__all__ = ["FAILURE"]


def _look(evidence: Evidence) -> Looked:
    suspicions: list[Suspicion] = []
    clear: list[str] = []
    floor = metrics.floor(getattr(torch, evidence.dtype))
    for stack in evidence.stacks:
        residuals = evidence.course("residual", stack, site="stream", part="out")
        if not residuals:
            continue
        rounding = tuple(layer for layer in residuals if evidence.at_floor(stack, layer))
        if rounding:
            rows = [residuals[layer] for layer in rounding]
            suspicions.append(
                Suspicion(
                    f"The {stack}'s tokens differ by rounding in {evidence.dtype} alone after "
                    f"{layer_words(rounding)} of {max(residuals)}: cosines, ranks and shares taken there are numbers "
                    "of noise, and no other verdict rests on them.",
                    stack,
                    Severity.NOTE,
                    layers=rounding,
                    comparisons=tuple(
                        Comparison("residual", f"{stack} layer {row.layer}", row.value, row.stderr, "dtype", floor)
                        for row in rows
                        if row.value is not None
                    ),
                )
            )
        else:
            least = min(residuals.values(), key=lambda row: row.value or 0.0)
            clear.append(
                f"{stack}: tokens differ by {number(least.value)} of the stream's size or more (layer {least.layer}), "
                f"{evidence.dtype} resolves {number(floor)}"
            )
    if not suspicions and not clear:
        return Looked(unchecked="needs a stream of several tokens, or of several samples.")
    return Looked(tuple(suspicions), clear=f"{'; '.join(clear)}.")


FAILURE = Failure(
    name="at-the-floor",
    title="Numbers that are rounding",
    means=(
        "After these layers the tokens of a sequence are one vector up to the rounding of the dtype in which the model "
        "ran: what is left of a token after the mean is taken off is below eight times its precision. Whatever is "
        "computed from that remainder (cosines of it, its rank, its share) is a number of the arithmetic, not of the "
        "model."
    ),
    harmless=(
        "In bfloat16 the floor is at 6 % of the stream's size: a large vector that all tokens share brings healthy "
        "models there. A run in float32 tells."
    ),
    tested=(
        "From the numbers alone: the residual ‖X − 1x̄ᵀ‖ / ‖X‖ of each layer is held against eight times the precision "
        "of the run's dtype. Other failures leave these layers out, or rest on nothing but their being there."
    ),
    refuted_by="A run in a wider dtype gives the same residual.",
    command="fullrank examine {model} --dtype float64",
    papers=(
        "wu_masks_layernorm: On the Role of Attention Masks and LayerNorm (arXiv 2405.18781)",
        "dong: Attention is not all you need (arXiv 2103.03404)",
    ),
    valid_for="any",
    look=_look,
)
