"""A learned sink: a key of each head that takes attention and returns nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.calibrating import Calibrated, calibrate
from fullrank.remedies.attention.scores import clear_of_sinks, per_query_head, row_blocks, scores, whole_mask
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["LearnedSink", "learned_sink"]

_BELOW = 16.0  # e⁻¹⁶ is a ten-millionth
_ALIGNED = 8  # fused kernels want widths that are multiples of it


class LearnedSink(Calibrated):
    """A_ts = e^{s_ts}/(Σ_r e^{s_tr} + e^{σ_h}).

    Where queries and keys are shown, a key is added that has 1 in a feature of its own, in which queries hold σ_h and
    keys 0; its value is 0. So key heads may be shared by query heads with other sinks. Causal calls without a mask get
    a query before all others too, and keep their flag.

    Args:
        heads: number of query heads.
        start: σ_h at first.
    """

    def __init__(self, heads: int, start: float) -> None:
        super().__init__(heads, start, learnable=True)

    def measure(self, call: Call) -> Tensor:
        """σ_h so low that no query of this call gives the sink more than a ten-millionth."""
        least = torch.full_like(self.per_head, float("inf"))
        for rows in row_blocks(call):
            s, seen = scores(call, rows)
            total = s.logsumexp(-1)
            if seen is not None:
                total = total.masked_fill(~seen.expand(s.shape).any(-1), float("inf"))
            least = torch.minimum(least, total.amin((0, 2)).to(least))
        return torch.where(torch.isfinite(least), least, 0.0) - _BELOW

    def forward(self, call: Call, output: Tensor | None = None) -> Call | Tensor:
        """The call with a sink; or, of a model that softmaxes by itself, its output without the sink's share."""
        sink = self.present(call)
        if output is None:
            clear_of_sinks(call)
            return call.change(attend=partial(self._attend, sink))
        s, _ = scores(call)
        left = torch.sigmoid(s.logsumexp(-1, keepdim=True) - sink.to(s.dtype)[:, None, None])
        return output * left.to(output.dtype)

    @staticmethod
    def _attend(sigma: Tensor, call: Call) -> Tensor:
        Q, K, V = call.query, call.key, call.value
        assert Q is not None
        assert K is not None
        d, width = Q.shape[-1], V.shape[-1]
        scale = d**-0.5 if call.scale is None else call.scale
        wide = (d // _ALIGNED + 1) * _ALIGNED
        logit = (sigma / scale).to(Q.dtype)[None, :, None, None].expand(*Q.shape[:3], 1)
        Q = torch.cat([Q, logit, Q.new_zeros(*Q.shape[:3], wide - d - 1)], -1)
        K = functional.pad(K, (0, wide - d))
        V = functional.pad(V, (0, wide - d)) if width == d else V
        sink = functional.one_hot(torch.tensor(d, device=K.device), wide).to(K.dtype).expand(*K.shape[:2], 1, wide)
        none = V.new_zeros(*V.shape[:2], 1, V.shape[-1])
        mask = whole_mask(call)
        if mask is None and call.causal:
            Q = functional.pad(Q, (0, 0, 1, 0))  # sees the sink alone; every other query sees one key more
            K, V = torch.cat([sink, K], -2), torch.cat([none, V], -2)
        else:
            K, V = torch.cat([K, sink], -2), torch.cat([V, none], -2)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], call.keys)
            mask = functional.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)
            mask = mask if mask.dtype == torch.bool else mask.to(Q.dtype)
        K, V = per_query_head(K, Q.shape[1]), per_query_head(V, Q.shape[1])
        causal = mask is None and call.causal
        output = functional.scaled_dot_product_attention(Q, K, V, attn_mask=mask, is_causal=causal, scale=scale)
        return output[..., 1 if causal else 0 :, :width]


@remedy(
    "learned-sink",
    "a key of each head that takes attention and returns nothing",
    addresses=("sinks",),
    acts_on="attention",
    exactness="identity-now",
    formula="A_ts = e^{s_ts}/(Σ_r e^{s_tr} + e^{σ_h}), one σ_h per head; σ_h → −∞ is the softmax, σ_h = 0 "
    "softmax-off-by-one",
    papers=("as `sinks` in gpt-oss of Hugging Face and `head_learned_sink` in x-transformers",),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter(
            "start",
            "σ_h at first; none for so low that no query of the batch gives the sink more than a ten-millionth",
            None,
            low=-100.0,
            high=100.0,
            optional=True,
        ),
    ),
    limits=(
        "Started low it leaves the function as it is, and its gradient is of the size of the mass that it takes: it is "
        "learnt slowly, and by optimisers that do not rescale gradients hardly. From 0 it acts at once and changes the "
        "function.",
        "With queries and keys shown, dropout of attention weights is left out.",
        "It is put into what the kernel is given: apply it after remedies that scale queries.",
    ),
    cost=(
        "one key more, widths of a head rounded up to the next multiple of eight, keys and values copied; fused "
        "kernels "
        "stay; one parameter per head"
    ),
)
def learned_sink(patient: Patient, *, start: float | None = None) -> Edit:
    """Give every head of every self-attention a sink."""
    made: list[LearnedSink] = []

    def make(site: Site) -> LearnedSink:
        made.append(LearnedSink(site.first.heads, 0.0 if start is None else start))
        return made[-1]

    def shown(site: Site) -> LearnedSink | None:
        return make(site) if site.first.width is not None else None

    def hidden(site: Site) -> LearnedSink | None:
        return make(site) if site.first.width is None else None

    edit = patient.rewrite("learned-sink", before=shown, after=hidden)
    if start is None:
        with edit.kept():
            calibrate(patient, made)
    return edit
