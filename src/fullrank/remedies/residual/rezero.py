"""ReZero: blocks that begin as the identity, one trained number for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fullrank.edit import Branch, Edit, together
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Gain, scaled_branches, stack_of
from fullrank.remedies.residual.norm_changes import without_norms

__all__ = ["rezero"]


class Same:
    """The gain that is registered at another branch of the block; a second name for it would be a tied weight.

    Args:
        gain: that one.
    """

    def __init__(self, gain: Gain) -> None:
        self.gain = gain

    def __call__(self, F: Tensor) -> Tensor:
        """What is added, scaled."""
        return F * self.gain.alpha.to(F.dtype)


@remedy(
    "rezero",
    "blocks that begin as the identity",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="residual",
    exactness="init-only",
    formula="X ← X + αF(X); α = 0 at first, trained, one for all branches of a block; norms=remove: N(X) ← X",
    papers=("ReZero, released code majumderb/rezero",),
    keys=("residual_scaling",),
    parameters=(
        Parameter("start", "α at first", 0.0, low=-10.0, high=10.0),
        Parameter(
            "norms", "the paper takes norms out of the blocks", "remove", kind="choice", choices=("remove", "keep")
        ),
    ),
    limits=(
        "At first the blocks do nothing: every profile of the stream is kept, which says nothing of how it will train.",
        "In the first step only α has a gradient; weights of the blocks learn once it has moved.",
        "For fresh weights: a trained model loses its blocks. Where norms are removed their parameters stay, without a "
        "gradient.",
        "Norms before the first block and after the last stay.",
        "Without norms nothing bounds the stream or the scores later in training.",
        "Read in code only.",
    ),
    cost="one number per block and one product per branch; without norms less than before",
)
def rezero(patient: Patient, *, start: float = 0.0, norms: str = "remove") -> Edit:
    """Multiply the branches of each block by one number, and leave norms out."""
    gains: dict[str, Gain] = {}

    def by(branch: Branch) -> Callable[[Tensor], Tensor]:
        path = stack_of(patient, branch.stack).paths[branch.layer - 1]
        if path in gains:
            return Same(gains[path])
        gains[path] = Gain(1, start)
        return gains[path]

    def edits() -> Iterator[Edit]:
        if norms == "remove":
            yield from without_norms(patient)  # before the scales: what is multiplied by 0 shows no norm
        yield from scaled_branches(patient, "rezero", by)

    return together(edits())
