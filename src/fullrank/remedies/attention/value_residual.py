"""Value residual: the first layer's values mixed into those of every later layer."""

from __future__ import annotations

import torch
from torch import nn

from fullrank.edit import Call, Edit
from fullrank.edit.rewriting import Before
from fullrank.remedies.attention.first_values import FirstValues, with_first_values
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["ValueResidual", "value_residual"]


class ValueResidual(nn.Module):
    """V_ℓ ← λ₁V_1 + λ₂V_ℓ for ℓ ≥ 2.

    Args:
        values: where V_1 is.
        first: λ₁ at first.
        own: λ₂ at first.
        learnable: whether they are parameters.
    """

    def __init__(self, values: FirstValues, first: float, own: float, *, learnable: bool) -> None:
        super().__init__()
        self.values = values
        mix = torch.tensor([first, own])
        self.mix = nn.Parameter(mix) if learnable else None
        self._fixed = (first, own)

    def forward(self, call: Call) -> Call:
        """The call on mixed values; the first layer's stays as it is."""
        if self.values.first(call):
            self.values.put(call)
            return call
        V = call.value
        if self.mix is None:
            first, own = self._fixed
            return call.change(value=first * self.values.of(call, V) + own * V)
        mix = self.mix.to(torch.promote_types(V.dtype, torch.float32))
        return call.change(value=(mix[0] * self.values.of(call, V) + mix[1] * V).to(V.dtype))


@remedy(
    "value-residual",
    "the first layer's values mixed into those of every later layer",
    addresses=("rank-collapse-depth", "context-dilution", "sinks"),
    acts_on="attention",
    exactness="identity-now",
    formula="V_ℓ ← λ₁V_1 + λ₂V_ℓ for ℓ ≥ 2; learnable from λ₁ = 0, λ₂ = 1, or fixed at ½, ½",
    papers=("Zhou et al.: Value Residual Learning (ResFormer), ACL 2025, arXiv 2410.17897",),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter(
            "kind",
            "one pair of numbers to be learnt for each layer, or fixed ones",
            "learnable",
            kind="choice",
            choices=("learnable", "fixed"),
        ),
        Parameter(
            "first", "λ₁; none for 0 where it is learnt and ½ where it is fixed", None, low=-10, high=10, optional=True
        ),
        Parameter(
            "own", "λ₂; none for 1 where it is learnt and ½ where it is fixed", None, low=-10, high=10, optional=True
        ),
    ),
    limits=(
        "Learnable, it does nothing until it is trained.",
        "Attention alone collapses with it all the same: values are still averaged. It is for what tokens forget of "
        "themselves with depth.",
        "All layers of a stack must have values of one form: as many heads, as wide, for the same tokens.",
    ),
    cost="one sum of values per layer; fused kernels stay; two numbers per layer beyond the first, none where fixed",
)
def value_residual(
    patient: Patient, *, kind: str = "learnable", first: float | None = None, own: float | None = None
) -> Edit:
    """Mix V_1 into the values of every later self-attention."""
    learnable = kind == "learnable"
    usual = (0.0, 1.0) if learnable else (0.5, 0.5)
    one, two = usual[0] if first is None else first, usual[1] if own is None else own

    def make(site: Site, values: FirstValues) -> Before:
        return ValueResidual(values, one, two, learnable=learnable)

    return with_first_values(patient, "value-residual", make)
