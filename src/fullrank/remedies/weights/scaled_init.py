"""Scaled initialisation: the last weights of each branch shrunk with depth."""

from __future__ import annotations

from fullrank.edit import Edit
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import branches_of, scale_weights

__all__ = ["scaled_init"]

_FACTORS = {
    "gpt2": lambda layers, branches: branches**-0.5,
    "sqrt-depth": lambda layers, branches: layers**-0.5,
    "depth": lambda layers, branches: 1 / layers,
}


@remedy(
    "scaled-init",
    "the last weights of each branch shrunk with depth",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="weights",
    exactness="init-only",
    formula="W_O, W_down ← c(L)·W; gpt2: c = 1/√N, N = 2L branches of a stack of attention and MLP (3L with "
    "cross-attention); sqrt-depth: 1/√L, depth: 1/L",
    papers=("Radford et al.: Language Models are Unsupervised Multitask Learners, 2019 (gpt2)",),
    keys=("residual_scaling",),
    parameters=(Parameter("by", "the factor", "gpt2", kind="choice", choices=("gpt2", "sqrt-depth", "depth")),),
    limits=(
        "For fresh weights: on trained ones it removes most of what the blocks have learnt.",
        "Where the stream is normalised after every branch, depth counts otherwise: see deepnorm.",
        "Weights that all blocks share are shrunk once, by the number of calls.",
    ),
    cost="none",
    structural=False,
)
def scaled_init(patient: Patient, *, by: str = "gpt2") -> Edit:
    """Shrink W_O and W_down of every block."""
    layers = {stack.name: len(stack.paths) for stack in patient.anatomy.stacks}
    branches = branches_of(patient)
    return scale_weights(
        patient, lambda stack, layer, weight: _FACTORS[by](layers[stack], branches[stack]), "o", "down"
    )
