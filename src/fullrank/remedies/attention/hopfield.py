"""Hopfield attention: scores averaged across layers, with an α-skip."""

from __future__ import annotations

from torch import Tensor

from fullrank.edit import Edit, rewrite_residual, together
from fullrank.remedies.attention.carried_scores import Step, steps
from fullrank.remedies.attention.score_carrying import COST, CUT, LIMITS, carry_scores
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["hopfield"]


@remedy(
    "hopfield",
    "attention scores averaged across layers, forgetting exponentially",
    addresses=("rank-collapse-depth", "dead-depth"),
    acts_on="attention",
    exactness="changes-function",
    formula="h_ℓ = α′h_{ℓ−1} + (1 − α′)s_ℓ, s_ℓ = QKᵀ/√d_k, A_ℓ = softmax(h_ℓ); with skip=α: x ← αx + (1 − α)Attn",
    papers=(
        "Masumura, Taki: On the Role of Hidden States of Modern Hopfield Network in Transformer, NeurIPS 2025, "
        "arXiv 2511.20698",
    ),
    keys=("hopfield_attention",),
    parameters=(
        Parameter("average", "α′: what is kept of the scores before; 0 is plain attention", 0.5, low=0.0, high=1.0),
        Parameter(
            "start",
            "h_0 = 0 (`zero`), which flattens the first layer's map, or h_1 = s_1 (`first`)",
            "zero",
            kind="choice",
            choices=("zero", "first"),
        ),
        Parameter(
            "skip", "α of x ← αx + (1 − α)Attn; none for the model's own", None, low=0.0, high=1.0, optional=True
        ),
        *CUT,
    ),
    limits=(
        "Which start the paper uses is not known, nor whether its α-skip leaves the MLP's addition alone, as here: its "
        "equations were read in summaries.",
        "Averaging shrinks scores of independent layers by √((1 − α′)/(1 + α′)): maps are flatter.",
        "At initialisation it delays the collapse of attention without skips by a layer or two, and adds nothing once "
        "there is a skip; what is claimed for it comes of training.",
        *LIMITS,
    ),
    cost=COST,
)
def hopfield(
    patient: Patient,
    *,
    average: float = 0.5,
    start: str = "zero",
    skip: float | None = None,
    keep: int | None = None,
    tolerance: float = 0.0,
) -> Edit:
    """Average the scores of self-attention across layers."""

    def rule(layers: int) -> tuple[Step, ...]:
        return steps(layers, "average", keeps=average, start=start)  # type: ignore[arg-type]

    if skip is not None:
        patient.branches  # looked at before anything is changed  # noqa: B018
    edit = carry_scores(patient, "hopfield", rule, keep=keep, tolerance=tolerance)
    if skip is None:
        return edit
    where = edit.where
    with edit.kept():
        mixed = rewrite_residual(patient.model, patient.anatomy, patient.branches, _Mixed(skip), branch="attention")
    places = mixed.where
    edit = together([edit, mixed])
    edit.where = (*places, *where)
    return edit


class _Mixed:
    """X ← αX + (1 − α)F, in the place of X + F."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        return self.alpha * X + (1 - self.alpha) * F
