"""Residual scaling: branches, and if wanted the skip, multiplied by numbers that depend on depth."""

from __future__ import annotations

from fullrank.edit import Branch, Edit, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Weighted, added_otherwise, depth_of, scaled_branches

__all__ = ["residual_scale"]

_RULES = {
    "sqrt-branches": lambda L: (2 * L) ** -0.5,
    "sqrt-depth": lambda L: L**-0.5,
    "depth": lambda L: 1 / L,
    "number": lambda L: 1.0,
}


@remedy(
    "residual-scale",
    "branches scaled by depth",
    addresses=("rank-collapse-depth", "vanishing-or-exploding", "query-key-starvation"),
    acts_on="residual",
    exactness="init-only",
    formula="X ← λX + βF(X), β = α·c(L); c: sqrt-branches 1/√(2L), sqrt-depth 1/√L, depth 1/L, number 1; λ = 1, or "
    "λ² + β² = 1",
    papers=(
        "Noci et al.: Signal Propagation in Transformers, NeurIPS 2022, arXiv 2206.03126 (α/√L)",
        "Depth-μP, arXiv 2310.02244 (a/√L)",
        "CompleteP, arXiv 2505.01618 (1/L)",
    ),
    keys=("residual_scaling", "noci"),
    parameters=(
        Parameter(
            "by",
            "how the factor depends on the number L of blocks of a stack",
            "sqrt-branches",
            kind="choice",
            choices=tuple(_RULES),
        ),
        Parameter("alpha", "α", 1.0, low=0.0, high=1e3),
        Parameter(
            "attention",
            "α of attention, cross-attention included; none for that of all",
            None,
            low=0.0,
            high=1e3,
            optional=True,
        ),
        Parameter("mlp", "α of the MLP; none for that of all", None, low=0.0, high=1e3, optional=True),
        Parameter(
            "skip",
            "whether the skip stays (one), or is scaled too so that the squares sum to one (variance)",
            "one",
            kind="choice",
            choices=("one", "variance"),
        ),
    ),
    limits=(
        "For fresh weights, or for training from here: on a trained model it takes away most of what the blocks add.",
        "The same function as scaled weights, with other gradients: the weights of a scaled branch are not smaller.",
        "Where a norm follows every sum (post-norm) the stream is brought back to size, and depth counts otherwise: "
        "see deepnorm.",
        "L counts blocks, of two branches each; a decoder's third branch is not counted.",
        "Depth-μP and CompleteP scale learning rates too, and were read in the abstract only.",
    ),
    cost="one product per branch; it can be folded into the branch's last weights",
)
def residual_scale(
    patient: Patient,
    *,
    by: str = "sqrt-branches",
    alpha: float = 1.0,
    attention: float | None = None,
    mlp: float | None = None,
    skip: str = "one",
) -> Edit:
    """Scale every branch, and the skip where that is wanted."""

    def factor(branch: Branch) -> float:
        own = mlp if branch.name.startswith("mlp") else attention
        return float((alpha if own is None else own) * _RULES[by](depth_of(patient, branch)))

    def weighted(branch: Branch) -> Weighted:
        beta = factor(branch)
        beside = [
            one for one in patient.branches.of(branch.stack, branch.layer).values() if one.addition == branch.addition
        ]
        if beta > 1:
            raise RemedyError(
                f"residual-scale: skip=variance needs a factor of at most 1, and that of {branch.name} is {beta:g}; "
                "choose a smaller alpha=, or skip=one."
            )
        if any(factor(one) != beta for one in beside):
            raise RemedyError(
                "residual-scale: skip=variance needs one factor for branches that are summed before they are added, as "
                f"{' and '.join(one.name for one in beside)} of this {type(patient.model).__name__} are."
            )
        return Weighted((1 - beta**2) ** 0.5, beta)

    edits = (
        added_otherwise(patient, "residual-scale", weighted)
        if skip == "variance"
        else scaled_branches(patient, "residual-scale", factor)
    )
    return together(edits)
