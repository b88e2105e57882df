"""DeepScaleLM's initialisation: weights, embeddings and the residual such that every moment stays at one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.capture import Anatomy
from fullrank.capture.anatomy import Stack
from fullrank.capture.weights import Weight, matrix
from fullrank.edit import Branches, Edit, replace_weight, rewrite_residual
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import all_or_none
from fullrank.remedies.weights.drawing import HOW, SEED, sized, sized_weights, unscaled_queries
from fullrank.remedies.weights.embeddings import tables
from fullrank.theory.deepscalelm_init import FIRST_CORRELATION, UnitMoments, unit_moments

__all__ = ["Weighted", "deepscale_init"]

_ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True)
class Weighted:
    """X, F → λX + βF.

    Attributes:
        skip: λ.
        branch: β.
    """

    skip: float
    branch: float

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        """The next state."""
        return self.skip * X + self.branch * F


@remedy(
    "deepscale-init",
    "weights and residual that keep the stream's variance at one, whatever the depth",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="weights",
    exactness="init-only",
    formula="X ← λX + βF(X), λ² + β² = 1, β² = 1/L; σ_qk² = 1/d, σ_vo⁴ = (1−p)/(d²r), σ_ffn⁴ = 2(1−p)/(d·d_ff), "
    "σ_embed² = (1−p)/#tables; r ← λ²r + β²r_F from r₀, layer by layer",
    papers=("Kedia, Zaidi, Khyalia, Jung, Goka, Lee: Transformers Get Stable, ICML 2024, arXiv 2403.09635",),
    keys=("deepscalelm",),
    parameters=(
        Parameter("branch_square", "β²; none: 1/L", None, above=0.0, low=0.0, high=1.0, optional=True),
        Parameter("correlation", "r₀, between tokens before the first block", FIRST_CORRELATION, above=0.0, high=1.0),
        Parameter("dropout", "p, behind embeddings and branches", 0.0, low=0.0, high=0.95),
        Parameter(
            "tokens", "T, for short sequences; none: infinite, as in the paper", None, "integer", 2, optional=True
        ),
        Parameter(
            "residual", "whether λ and β are put in; without them weights alone are changed", True, kind="switch"
        ),
        Parameter("embeddings", "whether embeddings are brought to unit variance", True, kind="switch"),
        HOW,
        SEED,
    ),
    limits=(
        "For fresh weights: on trained ones it removes most of what was learnt.",
        "σ_ffn is that of one hidden layer of ReLU; GELU and SiLU have 15 and 29 % less variance behind it. Of gated "
        "MLPs, which the paper has not: σ⁶ = 2(1−p)/(d²·d_ff), as if the gate were ReLU.",
        "A table tied to the head stays as it is: unit variance would make logits of √d. Patches and positions that "
        "are plain parameters stay too.",
        "Cross-attention is ours: r is that of the encoder's last state; experts are drawn as if each were alone.",
        "The paper's rule for causal masks and RMSNorm was not verified; biases stay as they are.",
    ),
    cost="two multiplications of the stream per branch; no parameters",
    only_weights={"residual": False},
)
def deepscale_init(
    patient: Patient,
    *,
    branch_square: float | None = None,
    correlation: float = FIRST_CORRELATION,
    dropout: float = 0.0,
    tokens: int | None = None,
    residual: bool = True,
    embeddings: bool = True,
    how: str = "rescale",
    seed: int = 0,
) -> Edit:
    """Bring weights to DeepScaleLM's standard deviations, and weigh skip and branch."""
    keep = 1 - dropout
    moments = {
        stack.name: unit_moments(
            depth=len(stack.paths),
            width=stack.width,
            mlp_width=_size(patient, stack, "up", 0),
            attention_width=_size(patient, stack, "o", 1),
            dropout=dropout,
            correlation=correlation,
            branch_square=branch_square,
            tokens=math.inf if tokens is None else tokens,
        )
        for stack in patient.anatomy.stacks
    }
    gated = {stack for stack, _, _ in patient.weights("gate")}
    queries = unscaled_queries(patient)

    def std(stack: str, layer: int, weight: Weight, inputs: int) -> float:
        of = moments[stack]
        if weight.role in ("q", "k"):
            return float(of.qk[layer - 1]) * queries(stack, layer, weight)
        if weight.role in ("v", "o"):
            return float(_of_cross(moments, stack, layer) if weight.call.startswith("cross") else of.vo[layer - 1])
        if stack not in gated:
            return float(of.ffn[layer - 1])
        hidden = inputs if weight.role == "down" else matrix(patient.model, weight).shape[0]
        width = matrix(patient.model, weight).shape[0] if weight.role == "down" else inputs
        return float((2 * keep / (width**2 * hidden)) ** (1 / 6))

    def edits() -> Iterator[Edit]:
        yield sized_weights(patient, std, *_ROLES, how=how, seed=seed)
        if embeddings:
            yield from _embeddings(patient, keep, how, seed)
        if residual:
            for stack, of in moments.items():
                shared = _summed(patient.branches, stack)
                function = Weighted(of.skip, of.branch / math.sqrt(shared))
                yield rewrite_residual(
                    patient.model, _only(patient.anatomy, stack), patient.branches, function, stack=stack
                )

    edit = all_or_none(edits())
    if edit is None:
        raise RemedyError(f"this {type(patient.model).__name__} has no blocks with weights that are known.")
    return edit


def _size(patient: Patient, stack: Stack, role: str, axis: int) -> int | None:
    """Rows or columns of the first weight of a role that can be read."""
    found = (each for layer in stack.weights for each in layer if each.role == role and not each.reason)
    first = next(found, None)
    return None if first is None else matrix(patient.model, first).shape[axis]


def _of_cross(moments: dict[str, UnitMoments], stack: str, layer: int) -> float:
    """σ_vo of attention to another stack: its last correlation stands for r."""
    other = next((of for name, of in moments.items() if name != stack), moments[stack])
    own = moments[stack]
    return float(own.vo[layer - 1] * (own.correlation[layer - 1] / other.correlation[-1]) ** 0.25)


def _summed(branches: Branches, stack: str) -> int:
    """How many branches are summed before they are added, as in parallel blocks: their sum is to have variance 1."""
    mine = [(one.layer, one.addition) for one in branches if one.stack == stack]
    return max((mine.count(one) for one in mine), default=1)


def _only(anatomy: Anatomy, stack: str) -> Anatomy:
    return Anatomy(tuple(one for one in anatomy.stacks if one.name == stack), anatomy.notes, anatomy.apart)


def _embeddings(patient: Patient, keep: float, how: str, seed: int) -> Iterator[Edit]:
    found = tables(patient)
    generator = torch.Generator().manual_seed(seed + 1)
    for table in found:
        if not table.tied:
            std, name = math.sqrt(keep / len(found)), table.parameter
            yield replace_weight(
                patient.model,
                name,
                lambda W, std=std, name=name: sized(W, std, how, generator, name),  # type: ignore[misc]
            )
