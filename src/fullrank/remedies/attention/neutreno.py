"""NeuTRENO: what attention lost of the first layer's values is handed back to it."""

from __future__ import annotations

from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.edit.rewriting import After, Before
from fullrank.remedies.attention.first_values import FirstValues, Putting, with_first_values
from fullrank.remedies.attention.own_keys import LIMIT, at_own_keys, own_keys, paired
from fullrank.remedies.attention.scores import per_query_head
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["neutreno"]


class _Returning:
    """O_ℓ ← A V_ℓ + λ(V_1 − V_ℓ) for ℓ ≥ 2."""

    def __init__(self, values: FirstValues, strength: float, *, paired: bool) -> None:
        self.values, self.strength, self.paired = values, strength, paired

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        if self.values.first(call):
            return output
        V = call.value[..., : output.shape[-1]]  # what is beyond is another edit's padding
        lost = self.values.of(call, V) - V
        lost = at_own_keys(lost, call.queries, own_keys(call, "neutreno", paired=self.paired))
        return output + self.strength * per_query_head(lost, output.shape[1])


@remedy(
    "neutreno",
    "the difference from the first layer's values added to each head's output",
    addresses=("rank-collapse-depth", "averaging-heads"),
    acts_on="attention",
    exactness="changes-function",
    formula="O_ℓ = A V_ℓ + λ(V_1 − V_ℓ) for ℓ ≥ 2, by head, before W_O",
    papers=(
        "Nguyen, Nguyen, Baraniuk: Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals, "
        "NeurIPS 2023, arXiv 2312.00751",
    ),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("strength", "λ; 0.6 for DeiT-tiny, 0.4 where others compared it", 0.6, low=0.0, high=10.0),),
    limits=(
        "Changes the function at once and by much: for models that are trained with it.",
        LIMIT,
        "All layers of a stack must have values of one form: as many heads, as wide, for the same tokens.",
    ),
    cost="two sums of values per layer; fused kernels stay; no parameters",
)
def neutreno(patient: Patient, *, strength: float = 0.6) -> Edit:
    """Add λ(V_1 − V_ℓ) to the output of every self-attention beyond the first layer."""

    def before(site: Site, values: FirstValues) -> Before:
        return Putting(values)

    def after(site: Site, values: FirstValues) -> After:
        return _Returning(values, strength, paired=paired(site))

    return with_first_values(patient, "neutreno", before, after)
