"""DeepScaleLM's initialisation: weights, embeddings and the residual such that every moment stays at one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fullrank.capture import Anatomy
from fullrank.capture.weights import Weight, matrix
from fullrank.edit import Branches, Edit, rewrite_residual, together
from fullrank.errors import RemedyError
from fullrank.remedies.covering import check_branches
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import check_weight
from fullrank.remedies.weights.drawing import HOW, SEED, sized_weights, unscaled_queries
from fullrank.remedies.weights.embeddings import NEAR, brought_to_variance, sums, tables
from fullrank.remedies.weights.stream_states import mean_squares
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
    formula="X ← λX + βF(X), λ² + β² = 1, β² = 1/L; σ_qk² = 1/d_in, σ_vo⁴ = (1−p)/(r·d_v·d_o), "
    "σ_ffn⁴ = 2(1−p)/(d_up·d_down), d_v and so on the inputs of each weight; σ_embed² = (1−p)/#tables; "
    "r ← λ²r + β²r_F from r₀, layer by layer",
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
        "MLPs, which the paper has not: σ⁶ = 2(1−p)/(d_up·d_gate·d_down), as if the gate were ReLU.",
        "A table tied to the head stays as it is, for unit variance would make logits of √d; and so do tables that are "
        "added to it, which would drown the words. Patches and positions that are plain parameters stay too.",
        "Where the first state's mean square is further than a factor of 2 from 1 − p on the batch, as in a model that "
        "multiplies its stream, its tables are multiplied by one number that brings it there; behind a norm none does. "
        "A stream that is then as far from it, at its start or at its end, is told in a note.",
        "Frozen tables are rescaled and never drawn; rows of padding are drawn as 0.",
        "Where scores are not scaled by 1/√d_h (T5, GPT-Neo) W_Q is smaller by what is missing, as measured.",
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
    check_branches(patient)
    keep = 1 - dropout
    moments = {
        stack.name: unit_moments(
            depth=len(stack.paths),
            width=stack.width,
            dropout=dropout,
            correlation=correlation,
            branch_square=branch_square,
            tokens=math.inf if tokens is None else tokens,
        )
        for stack in patient.anatomy.stacks
    }
    widths = {stack.name: stack.width for stack in patient.anatomy.stacks}
    beside = _Beside(patient)
    queries = unscaled_queries(patient)

    def std(stack: str, layer: int, weight: Weight, inputs: int) -> float:
        own = moments[stack]
        if weight.role in ("q", "k"):
            return queries(stack, layer, weight) / math.sqrt(inputs)
        if weight.role in ("v", "o"):
            gain = float(own.vo[layer - 1] ** 4) * widths[stack] ** 2
            if weight.call.startswith("cross"):
                gain *= float(own.correlation[layer - 1] / _other(moments, stack).correlation[-1])
            return math.pow(gain / beside.inputs(stack, layer, weight, ("v", "o")), 1 / 4)
        gated = beside.has(stack, layer, weight, "gate")
        together = beside.inputs(stack, layer, weight, ("up", "gate", "down") if gated else ("up", "down"))
        return math.pow(2 * keep / together, 1 / 6 if gated else 1 / 4)

    notes = list(queries.notes)

    def edits() -> Iterator[Edit]:
        yield sized_weights(patient, std, *_ROLES, how=how, seed=seed)
        if embeddings:
            yield from _embeddings(patient, keep, how, seed, notes)
        if residual:
            for stack, of in moments.items():
                shared = _summed(patient.branches, stack)
                function = Weighted(of.skip, of.branch / math.sqrt(shared))
                yield rewrite_residual(
                    patient.model, _only(patient.anatomy, stack), patient.branches, function, stack=stack
                )
        notes.extend(_off(patient, keep, ends=residual))

    edit = together(edits())
    if not edit.in_force:
        raise RemedyError(f"this {type(patient.model).__name__} has no blocks with weights that are known.")
    edit.notes = (*edit.notes, *notes)
    return edit


class _Beside:
    """Numbers of inputs of the weights that a weight is multiplied with."""

    def __init__(self, patient: Patient) -> None:
        self._inputs: dict[tuple[str, int, str, int | None], dict[str, int]] = {}
        for stack, layer, weight in patient.weights(*_ROLES):
            check_weight(patient, layer, weight)
            columns = matrix(patient.model, weight).shape[1]
            self._inputs.setdefault((stack, layer, weight.call, weight.expert), {})[weight.role] = columns

    def has(self, stack: str, layer: int, weight: Weight, role: str) -> bool:
        """Whether the weight has another of this role beside it."""
        return role in self._inputs.get((stack, layer, weight.call, weight.expert), {})

    def inputs(self, stack: str, layer: int, weight: Weight, roles: tuple[str, ...]) -> int:
        """The product of the numbers of inputs of these roles; of one that is not there, of the weight's own."""
        found = self._inputs[stack, layer, weight.call, weight.expert]
        return math.prod(found.get(role, found[weight.role]) for role in roles)


def _other(moments: dict[str, UnitMoments], stack: str) -> UnitMoments:
    """Of another stack, which cross-attention reads: its last correlation stands for r."""
    return next((of for name, of in moments.items() if name != stack), moments[stack])


def _summed(branches: Branches, stack: str) -> int:
    """How many branches are summed before they are added, as in parallel blocks: their sum is to have variance 1."""
    mine = [(one.layer, one.addition) for one in branches if one.stack == stack]
    return max((mine.count(one) for one in mine), default=1)


def _only(anatomy: Anatomy, stack: str) -> Anatomy:
    return Anatomy(tuple(one for one in anatomy.stacks if one.name == stack), anatomy.notes, anatomy.apart)


def _embeddings(patient: Patient, keep: float, how: str, seed: int, notes: list[str]) -> Iterator[Edit]:
    found = tables(patient)
    for group in sums(found):
        names = ", ".join(table.parameter for table in group)
        tied = " and ".join(table.parameter for table in group if table.tied)
        if not tied:
            yield brought_to_variance(patient, group, keep, how, seed + 1)
        elif len(group) == 1:
            notes.append(f"{names} is tied to the head and stays as it is: unit variance would make logits of √d.")
        else:
            notes.append(
                f"{tied} is tied to the head, and so {names}, which are added up, stay as they are: larger ones beside "
                "it would drown the words."
            )
    bare = [one.name for one in patient.anatomy.stacks if not any(one.name in table.stacks for table in found)]
    if bare:
        notes.append(
            f"No table of embeddings was seen in the first state of {' and '.join(bare)}: what makes it stays as it is."
        )


def _off(patient: Patient, keep: float, *, ends: bool) -> Iterator[str]:
    """A sentence for each stack whose stream is not of the size that it should be."""
    for (stack, layer), square in mean_squares(patient, ends=ends).items():
        if not keep / NEAR <= square <= keep * NEAR:
            where = "behind its last block" if layer else "in front of its first block"
            yield f"The stream of {stack} {where} has a mean square of {square:.3g} on this batch, not near {keep:g}."
