"""Peri-LN: what each branch adds is normalised too."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.edit import Branch, Edit, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import followed, scaled_branches
from fullrank.remedies.residual.norm_changes import placement

__all__ = ["OutputNorm", "peri_norm"]


class OutputNorm(nn.Module):
    """F ← γ ⊙ (F − mean)/√(variance + ε) + β, or γ ⊙ F/√(mean square + ε), over features, in float32 at least.

    Args:
        kind: `layer` or `rms`.
        width: features.
        eps: ε.
        start: γ at first.
    """

    def __init__(self, kind: Literal["layer", "rms"], width: int, eps: float, start: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.gain = nn.Parameter(torch.full((width,), start))
        self.shift = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, F: Tensor) -> Tensor:
        """What is added, normalised."""
        wide = torch.promote_types(F.dtype, torch.float32)
        Y, gain = F.to(wide), self.gain.to(wide)
        if self.shift is not None:
            return functional.layer_norm(Y, Y.shape[-1:], gain, self.shift.to(wide), self.eps).to(F.dtype)
        return (Y * torch.rsqrt(Y.square().mean(-1, keepdim=True) + self.eps) * gain).to(F.dtype)


@remedy(
    "peri-norm",
    "what each branch adds is normalised too",
    addresses=("vanishing-or-exploding", "dead-depth"),
    acts_on="norm",
    exactness="changes-function",
    formula="X ← X + N′(F(N(X))), N′ with trained gains, and for layer norm shifts",
    papers=("Peri-LN, ICML 2025, arXiv 2502.02732",),
    keys=("residual_scaling",),
    parameters=(
        Parameter(
            "kind",
            "of N′: as the norm that the branch reads through, or one of the two",
            "own",
            kind="choice",
            choices=("own", "layer", "rms"),
        ),
        Parameter("start", "its gains at first", 1.0, low=0.0, high=100.0),
    ),
    limits=(
        "For models whose branches read through a norm (pre-norm), to be trained from here; others are refused.",
        "Every branch adds as much as every other at first: the stream grows with the square root of depth.",
        "It does not keep tokens apart at initialisation.",
        "Its tables were not verified.",
    ),
    cost="one norm per branch; one or two numbers per feature and branch",
)
def peri_norm(patient: Patient, *, kind: str = "own", start: float = 1.0) -> Edit:
    """Put a norm behind every branch."""
    followed(patient)
    for stack in patient.anatomy.stacks:
        found = placement(patient, stack.name)
        if found != "pre":
            raise RemedyError(
                f"peri-norm is for branches that read through a norm and add without one, and the norms of "
                f"{stack.name} of this {type(patient.model).__name__} stand otherwise ({found})."
            )
        if stack.layout.axes not in ("tokens", "channels last"):
            raise RemedyError(f"the stream of {stack.name} does not hold features last, as peri-norm needs.")

    def by(branch: Branch) -> OutputNorm:
        own = next(one for one in patient.norms.of(branch.stack, branch.layer) if one.branch == branch.name)
        if kind == "own" and own.kind not in ("layer", "rms"):
            found = "a batch norm" if own.kind == "batch" else "neither a layer norm nor an RMS norm"
            raise RemedyError(
                f"the norm {own.path or 'of ' + branch.stack} that {branch.name} of layer {branch.layer} reads through "
                f"is {found}, and peri-norm makes none such; choose kind=layer or kind=rms."
            )
        made: Literal["layer", "rms"] = "rms" if "rms" in (kind, own.kind if kind == "own" else "") else "layer"
        eps = 1e-6 if math.isnan(own.eps) else own.eps
        return OutputNorm(made, own.width, eps, start)  # that of its stage, not of the whole stack

    return together(scaled_branches(patient, "peri-norm", by))
