"""Lambda-skip: the skip of attention has a strength of its own, which may be negative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.edit import Branch, Edit, together
from fullrank.edit.adding import Function
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Weighted, added_otherwise, followed
from fullrank.remedies.residual.norm_changes import placement

__all__ = ["LambdaSkip", "lambda_skip"]


class LambdaSkip(nn.Module):
    """X, F → λX + F.

    Args:
        start: λ at first.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.full((1,), start))

    def forward(self, X: Tensor, F: Tensor) -> Tensor:
        """The new state."""
        return X * self.strength.to(X.dtype) + F


@remedy(
    "lambda-skip",
    "a strength for the skip",
    addresses=("rank-collapse-depth",),
    acts_on="residual",
    exactness="changes-function",
    formula="X ← λX + F(X), in the paper followed by a norm: Y ← D(MYC_V + λY); λ may be negative",
    papers=("Joseph, Sieber, Zeilinger, Amo Alonso: Lambda-Skip Connections, ICLR 2025, arXiv 2410.10609",),
    keys=("lambda_skip",),
    parameters=(
        Parameter("strength", "λ, where it is learnt at first", 5.0, low=-100.0, high=100.0),
        Parameter("at", "which skips", "attention", kind="choice", choices=("attention", "all")),
        Parameter("learnable", "whether λ is trained, one for each skip", False, kind="switch"),
    ),
    limits=(
        "For models with a norm after the sum (post-norm). Elsewhere the state is multiplied by λ at every skip: "
        "blocks soon add nothing to it for |λ| > 1, and where it would leave what numbers hold it is refused.",
        "The theorem's condition asks for |λ| of thousands to millions; those of use are 2 to 20.",
        "With C_V = I tokens are kept apart for λ < −½ and slowly made alike for every larger λ; with random values "
        "and output projections the sign has no such part.",
        "A trained model reads other states than it learnt to.",
        "The paper was read in reviews only.",
    ),
    cost="one product per skip; one number per skip where it is learnt",
)
def lambda_skip(patient: Patient, *, strength: float = 5.0, at: str = "attention", learnable: bool = False) -> Edit:
    """Multiply the skip of attention, or of all branches."""

    def meant(branch: Branch) -> bool:
        return at == "all" or not branch.name.startswith("mlp")

    def function(branch: Branch) -> Function | None:
        if not meant(branch):
            return None
        return LambdaSkip(strength) if learnable else Weighted(strength, 1.0)

    for stack in patient.anatomy.stacks:
        skips = {(one.layer, one.addition) for one in followed(patient) if one.stack == stack.name and meant(one)}
        if placement(patient, stack.name) != "post":
            _refuse_overflow(patient, stack.name, strength, len(skips))
    edit = together(added_otherwise(patient, "lambda-skip", function))
    if not edit.in_force:
        raise RemedyError(f"this {type(patient.model).__name__} has no skip around attention; use at=all.")
    return edit


def _refuse_overflow(patient: Patient, stack: str, strength: float, skips: int) -> None:
    dtypes = [p.dtype for p in patient.model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    room = min((torch.finfo(dtype).max ** 0.25 for dtype in dtypes), default=1e9)  # norms square and sum
    most = room ** (1 / skips) if skips else abs(strength)
    if abs(strength) > most:
        raise RemedyError(
            f"lambda-skip would multiply the state of {stack} by {strength:g} at each of {skips} skips, and no norm "
            f"follows the sum: numbers overflow; choose a strength of at most {most:.3g}, or residual-scale."
        )
