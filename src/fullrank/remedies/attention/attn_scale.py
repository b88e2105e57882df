"""AttnScale: a gain for what attention adds to averaging, one for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.visible_mean import visible_mean
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["AttnScale", "attn_scale"]


class AttnScale(nn.Module):
    """O ← UV + (1 + ω_h)(AV − UV), where U averages over the visible keys.

    Args:
        heads: how many.
        start: ω_h at first.
    """

    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.full((heads,), start))

    def forward(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width), its high-frequency part scaled."""
        gain = self.omega.to(output.dtype)[:, None, None]
        return output + gain * (output - visible_mean(call))


@remedy(
    "attn-scale",
    "a gain per head for what attention adds to the mean",
    addresses=("rank-collapse-depth", "averaging-heads"),
    acts_on="attention",
    exactness="identity-now",
    formula="A ← U + (1 + ω_h)(A − U); U_ts = 1/#visible(t), ω_h = 0 at first, one per head and layer",
    papers=("Wang, Zheng, Chen, Wang: Anti-Oversmoothing in Deep Vision Transformers, ICLR 2022, arXiv 2203.05962",),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("start", "ω_h at first; 0 leaves the function as it is", 0.0, low=-1.0, high=100.0),),
    limits=("Does nothing until it is trained, or started elsewhere than at 0.",),
    cost="one mean over the visible values per call; fused kernels stay; one parameter per head",
)
def attn_scale(patient: Patient, *, start: float = 0.0) -> Edit:
    """Put a gain on A − U of every self-attention."""

    def make(site: Site) -> AttnScale:
        return AttnScale(site.first.heads, start)

    return patient.rewrite("attn-scale", after=make)
