"""LayerScale: a small trained number for each feature of each branch."""

from __future__ import annotations

from fullrank.edit import Branch, Edit, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Gain, depth_of, scaled_branches, shapes_of, stack_of

__all__ = ["layer_scale"]


@remedy(
    "layer-scale",
    "a small trained number for each feature of each branch",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="residual",
    exactness="init-only",
    formula="X ← X + diag(γ)F(X); γ = 10⁻⁵ at first, trained, one for each feature of each branch",
    papers=("LayerScale of CaiT, read in timm's cait.py",),
    keys=("residual_scaling",),
    parameters=(
        Parameter(
            "start",
            "γ at first; none for the rule of CaiT's models: 10⁻⁵ up to 24 blocks, 10⁻⁶ beyond",
            1e-5,
            low=-10.0,
            high=10.0,
            optional=True,
        ),
    ),
    limits=(
        "At first the blocks do next to nothing: every profile of the stream is kept, which says nothing of how it "
        "will train.",
        "For fresh weights: a trained model loses its blocks.",
        "In the tables of LayerNorm Scaling it is worse than the plain pre-norm model at 130M and 250M parameters.",
        "CaiT's models of 36 blocks have 10⁻⁵ (XS, XXS) or 10⁻⁶ (S, M).",
    ),
    cost="one number per feature and one product per branch",
)
def layer_scale(patient: Patient, *, start: float | None = 1e-5) -> Edit:
    """Multiply each feature of each branch by a number of its own."""
    shapes = shapes_of(patient)

    def by(branch: Branch) -> Gain:
        shape, axes = shapes[branch.stack, branch.layer, branch.name], stack_of(patient, branch.stack).layout.axes
        if len(shape) > (2 if axes == "samples" else 3) and axes != "channels last":
            raise RemedyError(f"the stream of {branch.stack} does not hold features last, as layer-scale needs.")
        usual = 1e-5 if depth_of(patient, branch) <= 24 else 1e-6
        return Gain(shape[-1], usual if start is None else start)

    return together(scaled_branches(patient, "layer-scale", by))
