"""RealFormer: attention scores added up from layer to layer."""

from __future__ import annotations

from fullrank.edit import Edit
from fullrank.remedies.attention.carried_scores import Step, steps
from fullrank.remedies.attention.score_carrying import COST, CUT, LIMITS, carry_scores
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["residual_scores"]


@remedy(
    "residual-scores",
    "attention scores added up, or averaged, over the layers",
    addresses=("rank-collapse-depth", "query-key-starvation"),
    acts_on="attention",
    exactness="changes-function",
    formula="S_ℓ = QKᵀ/√d_k + S_{ℓ−1}, A_ℓ = softmax(S_ℓ); kind=mean: softmax(S_ℓ/ℓ)",
    papers=(
        "He, Ravula, Kanagal, Ainslie: RealFormer: Transformer Likes Residual Attention, Findings of ACL 2021, "
        "arXiv 2012.11747",
    ),
    keys=("hopfield_attention",),
    parameters=(
        Parameter("kind", "the sum, or the mean of the layers so far", "sum", kind="choice", choices=("sum", "mean")),
        *CUT,
    ),
    limits=(
        "The running sum lets logits grow with depth, by ℓ where layers agree and by √ℓ where they do not: watch "
        "entropy collapse; the mean does not.",
        "Proposed for post-norm models trained with it from the start; a residual of the attention is reported as "
        "harmful elsewhere (arXiv 2410.17897, from a summary).",
        *LIMITS,
    ),
    cost=COST,
)
def residual_scores(patient: Patient, *, kind: str = "sum", keep: int | None = None, tolerance: float = 0.0) -> Edit:
    """Add up the scores of self-attention over the layers."""

    def rule(layers: int) -> tuple[Step, ...]:
        return steps(layers, kind)  # type: ignore[arg-type]

    return carry_scores(patient, "residual-scores", rule, keep=keep, tolerance=tolerance)
