"""Shaped attention: the identity, the map and averaging, each with a strength of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.own_keys import LIMIT, at_own_keys, own_keys, paired
from fullrank.remedies.attention.scores import per_query_head
from fullrank.remedies.attention.visible_mean import visible_mean
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["shaped"]

_STARTS: dict[str, tuple[float, float, float | None]] = {
    "identity": (0.0, 1.0, 0.0),
    "skipless": (1.0, 1.0, 1.0),
    "value-skipinit": (1.0, 0.0, None),
}
"""α, β, γ at first; None where the form has no such part."""


class Shaped(nn.Module):
    """O_h ← α_h V + β_h AV − γ_h UV.

    Args:
        heads: how many.
        alpha: α at first.
        beta: β at first.
        gamma: γ at first; None for no such part.
        paired: whether there was a key for every query when the model was repaired.
    """

    def __init__(self, heads: int, alpha: float, beta: float, gamma: float | None, *, paired: bool = True) -> None:
        super().__init__()
        self.paired = paired
        self.alpha = nn.Parameter(torch.full((heads,), alpha))
        self.beta = nn.Parameter(torch.full((heads,), beta))
        self.gamma = None if gamma is None else nn.Parameter(torch.full((heads,), gamma))

    def forward(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width), shaped."""
        shaped = self.beta.to(output.dtype)[:, None, None] * output
        own = at_own_keys(call.value, call.queries, own_keys(call, "shaped", paired=self.paired))
        shaped = shaped + self.alpha.to(output.dtype)[:, None, None] * per_query_head(own, output.shape[1])
        if self.gamma is None:
            return shaped
        return shaped - self.gamma.to(output.dtype)[:, None, None] * visible_mean(call)


@remedy(
    "shaped",
    "attention shaped towards the identity, with strengths per head",
    addresses=("rank-collapse-depth", "rank-collapse-width", "averaging-heads"),
    acts_on="attention",
    exactness="identity-now",
    formula=(
        "A ← α_h I + β_h A − γ_h U, one of each per head and layer, trained; at first (0, 1, 0), which is A; skipless: "
        "(1, 1, 1), which is α I where queries are zero; value-skipinit: A ← α_h I + β_h A from (1, 0)"
    ),
    papers=(
        "He, Hofmann: Simplifying Transformer Blocks, 2024, arXiv 2311.01906",
        "Noci et al.: The Shaped Transformer, 2023, arXiv 2306.17759",
        "He et al.: Deep Transformers without Shortcuts, 2023, arXiv 2302.10322",
    ),
    keys=("shaped_attention",),
    parameters=(
        Parameter(
            "start",
            "strengths at first: the function as it is, those of blocks without skips, or those of Value-SkipInit",
            "identity",
            kind="choice",
            choices=tuple(_STARTS),
        ),
    ),
    limits=(
        "From `identity` it does nothing until it is trained.",
        "The papers' blocks have no skips, zero queries and value and output weights that are the identity: this is "
        "their attention alone, and in a block with skips `skipless` and `value-skipinit` change much less.",
        "U is uniform over the visible keys, as C of the papers is where there are no position biases: with biases the "
        "map at zero queries is softmax(bias), which `skipless` does not cancel.",
        LIMIT,
        "Temperatures that depend on depth and width are no part of it: see temperature.",
        "As a block without norms it reached NaN elsewhere at depth 18: a start at the identity bounds no training.",
    ),
    cost="one mean over the visible values per call (see center-attention); fused kernels stay; 3 parameters per head",
)
def shaped(patient: Patient, *, start: str = "identity") -> Edit:
    """Give the identity, the map and the uniform part of every self-attention strengths of their own."""

    def make(site: Site) -> Shaped:
        return Shaped(site.first.heads, *_STARTS[start], paired=paired(site))

    return patient.rewrite("shaped", after=make)
