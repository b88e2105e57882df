"""Differential attention for models that have one map per head: a second temperature makes the second map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.capture.reading import visible_in
from fullrank.edit import Call, Edit
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.attention.dense_map import refuse_other_maps
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["differential", "lambda_at_first"]


def lambda_at_first(layer: int) -> float:
    """λ_init(l) = .8 − .6 exp(−.3 l), l from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Differential(nn.Module):
    """O_h ← (A_h − λ_h A′_h)V / (1 − λ_init), A′ the map of the queries times τ_h.

    Computed as A_h V + (λ_init (A_h − A′_h) − δ_h A′_h)V / (1 − λ_init): nothing is added, to the last bit, where both
    maps are the same. What dropout leaves of the second map is what it leaves of the first, plus A′_h − A_h.

    Args:
        heads: how many.
        shape: of τ beside the heads: () for one number, (width,) for one per feature of the queries.
        start: τ at first.
        strength: λ_init.
        width: of the values, where heads are normalised; None where they are not.
    """

    def __init__(self, heads: int, shape: tuple[int, ...], start: float, strength: float, width: int | None) -> None:
        super().__init__()
        self.strength = strength
        self.tau = nn.Parameter(torch.full((heads, *shape), start))
        self.delta = nn.Parameter(torch.zeros(heads))
        self.gain = None if width is None else nn.Parameter(torch.ones(width))

    def forward(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width), less a share of what the second map gives."""
        refuse_other_maps(call, "differential")
        put_in = call.remade is None if call.query is None else call.weights is not None
        if call.softcap is not None or put_in:
            raise EditError(
                f"differential makes its second map by softmax, and the first of {call.place.path} is bent, put in "
                "or with a sink."
            )
        assert call.output is not None
        wide, width = torch.promote_types(output.dtype, torch.float32), output.shape[-1]
        # beneath all modes: no other edit, and nothing that measures, is to take it for a call of the model
        with torch._C.DisableTorchFunction():
            second = self._explicit(call) if call.query is None else self._fused(call, call.query)
            # what is beyond the width is another edit's padding
            first, second = call.output[..., :width].to(wide), second[..., :width].to(wide)
            more = self.strength * (first - second) - self.delta.to(wide)[:, None, None] * second
        mixed = output + (more / (1 - self.strength)).to(output.dtype)  # the output is followed from the kernel on
        if self.gain is None:
            return mixed
        difference = (mixed * (1 - self.strength)).to(self.gain.dtype)
        return functional.rms_norm(difference, self.gain.shape, self.gain, 1e-5) * (1 - self.strength)

    def _fused(self, call: Call, query: Tensor) -> Tensor:
        tau = self.tau if self.tau.ndim == 2 else self.tau[:, None]
        second = _kernel(call, query * tau.to(query.dtype)[:, None, :])
        if call.dropout == 0:
            return second
        assert call.output is not None
        wide = torch.promote_types(second.dtype, torch.float32)
        return call.output.to(wide) + (second.to(wide) - _kernel(call, query).to(wide))  # with the noise of the first

    def _explicit(self, call: Call) -> Tensor:
        assert call.logits is not None
        assert call.weights is not None
        assert call.remade is not None
        tau = self.tau.to(call.logits.dtype)[:, None, None]
        visible = visible_in(call.logits)
        s = torch.where(visible, tau * torch.where(visible, call.logits, 0), call.logits)  # no 0 · ∞ backward
        A = call.weights + (call.remade(s) - call.remade(call.logits))  # with the noise of the first
        return _product(A, call.value)


def _kernel(call: Call, query: Tensor) -> Tensor:
    assert call.key is not None
    mask, causal = call.mask, call.causal
    if call.window is not None:
        mask, causal = call.visible(), False
        if call.bias is not None:
            assert mask is not None
            mask = torch.where(mask, call.bias.to(query.dtype), float("-inf"))
    elif call.bias is not None or (mask is not None and causal):
        mask, causal = call.additive(), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    several = call.key.shape[1] != query.shape[1]
    return functional.scaled_dot_product_attention(
        query, call.key, call.value, mask, is_causal=causal, scale=call.scale, enable_gqa=several
    )


def _product(A: Tensor, value: Tensor) -> Tensor:
    return A.to(value.dtype) @ value.repeat_interleave(A.shape[1] // value.shape[1], 1)


@remedy(
    "differential",
    "the difference of two maps of one head",
    addresses=("sinks", "averaging-heads", "rank-collapse-depth", "context-dilution"),
    acts_on="attention",
    exactness="identity-now",
    formula=(
        "A ← (softmax(s) − λ_h softmax(τ_h s)) / (1 − λ_init), λ_h = λ_init + δ_h, λ_init(l) = .8 − .6 exp(−.3 l), l "
        "from 0; δ_h = 0 and τ_h = 1 at first, which is A. norm=head: O ← (1 − λ_init) RMSNorm(O) for the division"
    ),
    papers=(
        "Differential Transformer, arXiv 2410.05258",
        "Dex, arXiv 2505.16333 (retrofits trained models, by another construction than this one)",
    ),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter(
            "second",
            "what tells the second map from the first: a temperature per head, or a factor per feature of its queries",
            "temperature",
            kind="choice",
            choices=("temperature", "features"),
        ),
        Parameter("start", "τ at first; 1 leaves the function as it is, 0 centres by λ", 1.0, low=0.0, high=100.0),
        Parameter("strength", "λ_init; by depth if none", None, low=0.0, high=0.99, optional=True),
        Parameter(
            "norm",
            "keep the scale by dividing by 1 − λ_init, or normalise each head as the paper does",
            "none",
            kind="choice",
            choices=("none", "head"),
        ),
    ),
    limits=(
        "Not the paper's layer: that has two projections of queries and keys for each head, half as many heads with "
        "values twice as wide, and λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init from trained vectors. Here the second "
        "map reads the same queries and keys, so that it can be put on any model as it is.",
        "From τ = 1 it does nothing until it is trained.",
        "The rows of the difference sum to (1 − λ)/(1 − λ_init), so one outlier stays: partial centring, of strength λ "
        "at τ = 0.",
        "Attention dropout is drawn once, and both maps have its noise, which so grows by no factor: in training with "
        "it a fused kernel is called once more, for the first map without. With rotary positions, factors per feature "
        "make scores depend on absolute positions too.",
        "Its second map is a softmax of what the kernel is given after all remedies: maps that are put in by another "
        "remedy, and sinks of the model, are refused, and caps where queries and keys are shown.",
        "Put remedies that change what comes out of the kernel before it in a list: center-attention, and learned-sink "
        "in models that softmax by themselves. After it they act on A alone, and what the difference is more than A, "
        "(λ_init (A − A′) − δ A′)V/(1 − λ_init), is added to what they make.",
        "Models that softmax by themselves show no queries: only second=temperature fits them, and their biases are "
        "scaled with the scores.",
    ),
    cost="a second kernel call per layer, with attention dropout a third: fused where masks allow; two parameters per "
    "head (features: d_k + 1)",
)
def differential(
    patient: Patient,
    *,
    second: str = "temperature",
    start: float = 1.0,
    strength: float | None = None,
    norm: str = "none",
) -> Edit:
    """Subtract a second map from the first of every self-attention."""

    def make(site: Site) -> Differential:
        seen = site.first
        if second == "features" and seen.width is None:
            raise RemedyError(
                f"differential with second=features needs queries, and {site.path} softmaxes by itself and shows none; "
                "use second=temperature."
            )
        shape = (seen.width,) if second == "features" and seen.width is not None else ()
        share = lambda_at_first(seen.place.layer - 1) if strength is None else strength
        return Differential(seen.heads, shape, start, share, seen.value_width if norm == "head" else None)

    return patient.rewrite("differential", after=make)
