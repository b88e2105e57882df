"""SkipInit: branches that begin at zero, one trained number for each."""

from __future__ import annotations

from collections.abc import Iterator

from fullrank.edit import Edit, together
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Gain, scaled_branches
from fullrank.remedies.residual.norm_changes import without_norms

__all__ = ["skip_init"]


@remedy(
    "skip-init",
    "branches that begin at zero",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="residual",
    exactness="init-only",
    formula="X ← X + αF(X); α = 0 at first, trained, one for each branch; norms=remove: N(X) ← X",
    papers=("SkipInit; in transformers by LayerNorm Scaling, NeurIPS 2025, arXiv 2502.05795, as a comparison",),
    keys=("residual_scaling",),
    parameters=(
        Parameter("start", "α at first", 0.0, low=-10.0, high=10.0),
        Parameter("norms", "whether norms stay in the blocks", "keep", kind="choice", choices=("keep", "remove")),
    ),
    limits=(
        "At first the blocks do nothing: every profile of the stream is kept, which says nothing of how it will train.",
        "In the first step only α has a gradient; weights of a branch learn once its α has moved.",
        "For fresh weights: a trained model loses its blocks.",
        "In the tables of LayerNorm Scaling it is worse than the plain pre-norm model at 130M and 250M parameters.",
        "Its exact form was not verified.",
    ),
    cost="one number and one product per branch",
)
def skip_init(patient: Patient, *, start: float = 0.0, norms: str = "keep") -> Edit:
    """Multiply each branch by a number of its own."""

    def edits() -> Iterator[Edit]:
        if norms == "remove":
            yield from without_norms(patient)  # before the scales: what is multiplied by 0 shows no norm
        yield from scaled_branches(patient, "skip-init", lambda branch: Gain(1, start))

    return together(edits())
