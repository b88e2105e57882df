"""Initialisation by its rate: every weight of a block of standard deviation d_in^−γ."""

from __future__ import annotations

from fullrank.capture.weights import Weight
from fullrank.edit import Edit
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weights.drawing import HOW, SEED, sized_weights, unscaled_queries

__all__ = ["small_init"]


@remedy(
    "small-init",
    "all weights of the blocks drawn small, by one rate",
    addresses=("query-key-starvation", "redundant-heads", "vanishing-or-exploding"),
    acts_on="weights",
    exactness="init-only",
    formula="std W = d_in^−γ for every weight of the blocks; γ ≤ ½ memorises, γ > ½ condenses (0.8: reasoning "
    "solutions)",
    papers=(
        "Zhang, Lin, Wang, Zhang, Xu, NeurIPS 2024, arXiv 2405.05409",
        "Chen, Luo, NeurIPS 2025, arXiv 2510.06954",
    ),
    keys=("condensation",),
    parameters=(
        Parameter("gamma", "γ; 0.3 to 0.5 is large, 0.6 to 0.8 small", 0.8, low=0.0, high=3.0),
        HOW,
        SEED,
    ),
    limits=(
        "For fresh weights: it replaces what was learnt.",
        "A small start condenses weights onto few directions on purpose: their rank falls at first, and training has "
        "a plateau before queries and keys move.",
        "Embeddings, the head and biases stay as they are; a norm in front of each branch hides a small stream.",
        "Where scores are not scaled by 1/√d_h (T5, GPT-Neo) W_Q is smaller by what is missing, as measured.",
    ),
    cost="none",
    structural=False,
)
def small_init(patient: Patient, *, gamma: float = 0.8, how: str = "rescale", seed: int = 0) -> Edit:
    """Give every weight of the blocks the standard deviation d_in^−γ."""
    queries = unscaled_queries(patient)

    def std(stack: str, layer: int, weight: Weight, inputs: int) -> float:
        return float(inputs**-gamma) * queries(stack, layer, weight)

    edit = sized_weights(patient, std, "q", "k", "v", "o", "up", "gate", "down", how=how, seed=seed)
    edit.notes = (*edit.notes, *queries.notes)
    return edit
