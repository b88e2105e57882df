"""Scaled initialisation: the last weights of each branch shrunk with depth."""

from __future__ import annotations

from contextlib import suppress

from fullrank.capture.weights import matrix
from fullrank.edit import Edit
from fullrank.errors import RemedyError
from fullrank.remedies.covering import branches_of
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import check_weight, scale_weights

__all__ = ["scaled_init"]

_FACTORS = {
    "gpt2": lambda layers, branches: branches**-0.5,
    "sqrt-depth": lambda layers, branches: layers**-0.5,
    "depth": lambda layers, branches: 1 / layers,
}
_ABOUT = 1.2  # to either side of c: what draws of small matrices and a few steps of training move


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
        "Fresh models of transformers' GPT-2 class have the factor gpt2 already, by their own initialisation: it would "
        "be there twice. A note says so where W_O and W_down are about c times W_V and W_up before.",
        "Refused where a branch has no last weight that is known, as linear attention and state spaces have.",
    ),
    cost="none",
    structural=False,
)
def scaled_init(patient: Patient, *, by: str = "gpt2") -> Edit:
    """Shrink W_O and W_down of every block."""
    layers = {stack.name: len(stack.paths) for stack in patient.anatomy.stacks}
    branches = branches_of(patient)
    c = {stack: _FACTORS[by](layers[stack], branches[stack]) for stack in layers}
    before = {stack: _shrunk(patient, stack) for stack in layers}
    edit = scale_weights(patient, lambda stack, layer, weight: c[stack], "o", "down")
    for stack, ratios in before.items():
        rule = next(
            (name for name, rule in _FACTORS.items() if _near(ratios, rule(layers[stack], branches[stack]))), ""
        )
        if rule:
            said = " and ".join(f"{ratio:.2g}" for ratio in ratios)
            edit.notes += (
                f"The last weights of {stack} were {said} of the first ones before, about what by={rule} makes them: "
                f"where its own initialisation has shrunk them with depth, they are shrunk twice now.",
            )
    return edit


def _near(ratios: list[float], c: float) -> bool:
    """Whether last weights are about c times the first ones, in attention and in MLPs; c = 1 is of no depth."""
    return c < 1 / _ABOUT and bool(ratios) and all(c / _ABOUT < ratio < c * _ABOUT for ratio in ratios)


def _shrunk(patient: Patient, stack: str) -> list[float]:
    """Root mean square of W_O over that of W_V, and of W_down over that of W_up; where both can be read."""
    square: dict[str, list[float]] = {}
    for name, layer, weight in patient.weights("v", "o", "up", "down"):
        if name == stack:
            with suppress(RemedyError):
                check_weight(patient, layer, weight)
                mean = float(matrix(patient.model, weight).double().square().mean())
                square.setdefault(weight.role, []).append(mean)
    means = {role: sum(each) / len(each) for role, each in square.items()}
    pairs = [(first, last) for first, last in (("v", "o"), ("up", "down")) if means.get(first) and last in means]
    return [(means[last] / means[first]) ** 0.5 for first, last in pairs]
