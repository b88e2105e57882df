"""LayerNorm Scaling: what blocks read shrinks with their depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fullrank.edit import Edit, replace_module, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.norm_changes import norms_in

__all__ = ["layernorm_scaling"]


class Shrunk:
    """N(X) times a number.

    Args:
        factor: the number.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the norm returns, smaller."""
        return run(*args, **kwargs) * self.factor


@remedy(
    "layernorm-scaling",
    "what blocks read shrinks with their depth",
    addresses=("dead-depth", "vanishing-or-exploding"),
    acts_on="norm",
    exactness="init-only",
    formula="X ← X + F(ℓ^−½·N(X)) in block ℓ = 1, 2, …, for each branch",
    papers=("LayerNorm Scaling, NeurIPS 2025, arXiv 2502.05795",),
    keys=("residual_scaling",),
    parameters=(Parameter("power", "p of ℓ^−p", 0.5, low=0.0, high=2.0),),
    limits=(
        "For models whose branches read through a norm (pre-norm), to be trained from here; others are refused, also "
        "where branches normalise what they add too (peri), which would undo it. Beside such a stack others stay as "
        "they are.",
        "On a trained model deeper blocks read what they have not learnt to read.",
        "It holds the growth of the stream with depth down; tokens still become alike.",
        "Scaled initialisation alone gives 60 to 71 % of its gain in the paper's own tables, and is not to be combined "
        "with it.",
    ),
    cost="one product per norm; it can be folded into the norm's gain; no parameters",
)
def layernorm_scaling(patient: Patient, *, power: float = 0.5) -> Edit:
    """Multiply what each pre-norm returns."""
    name = type(patient.model).__name__
    found = norms_in(
        patient, "read", why="layernorm-scaling acts on norms that branches read through; use residual-scale"
    )
    _refuse_peri(patient)
    if all(norm.layer == 1 for norms in found.values() for norm in norms):
        raise RemedyError(f"this {name} has one block, and layernorm-scaling leaves the first as it is.")

    def edits() -> Iterator[Edit]:
        for path, norms in found.items():
            layers = {norm.layer for norm in norms}
            if len(layers) > 1:
                raise RemedyError(
                    f"the norm {path} is shared by layers {min(layers)} to {max(layers)}: layernorm-scaling needs one "
                    "for each."
                )
            if layers != {1}:
                yield replace_module(patient.model, path, Shrunk(float(layers.pop() ** -power)))

    edit = together(edits())
    there = {norm.stack for norms in found.values() for norm in norms}
    edit.notes = tuple(
        f"the branches of {stack.name} read through no norm, and {stack.name} is left as it is."
        for stack in patient.anatomy.stacks
        if stack.name not in there
    )
    return edit


def _refuse_peri(patient: Patient) -> None:
    roles: dict[tuple[str, int, str], set[str]] = {}
    for norm in patient.norms:
        mine = roles.setdefault((norm.stack, norm.layer, norm.branch), set())
        mine.add(norm.role)
        if {"read", "branch"} <= mine:
            raise RemedyError(
                f"{norm.branch} of {norm.stack} layer {norm.layer} of this {type(patient.model).__name__} normalises "
                "what it adds too (peri), and layernorm-scaling would not make that smaller; use residual-scale."
            )
