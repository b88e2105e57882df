"""A local mask: each query sees the keys near it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.capture.reading import visible_in
from fullrank.edit import Call, Edit
from fullrank.errors import EditError
from fullrank.remedies.attention.own_keys import LIMIT, own_keys, paired
from fullrank.remedies.attention.own_windows import own_windows
from fullrank.remedies.attention.scores import seen_in
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["LocalMask", "local_mask"]


class LocalMask(nn.Module):
    """Hides keys at a distance of w and more, in addition to what is hidden.

    Args:
        window: w.
        first: how many of the first keys all queries go on seeing.
        past: whether later keys are hidden too.
        paired: whether there was a key for every query when the model was repaired.
        own: how many keys the model's own window shows; None where it has none.
    """

    window: Tensor

    def __init__(self, window: int, first: int, *, past: bool, paired: bool = True, own: int | None = None) -> None:
        super().__init__()
        self.register_buffer("window", torch.tensor(window))
        self.first, self.past, self.paired, self.own = first, past, paired, own

    def forward(self, call: Call) -> Call:
        """The call with a mask, or with masked scores."""
        near = self.near(call)
        if call.logits is not None:
            hidden = ~near & visible_in(call.logits)
            return call.change(logits=call.logits.masked_fill(hidden, torch.finfo(call.logits.dtype).min))
        if call.mask is None:
            return call.change(mask=near)
        if call.mask.dtype == torch.bool:
            return call.change(mask=call.mask & near)
        return call.change(mask=call.mask.masked_fill(~near, float("-inf")))

    def near(self, call: Call) -> Tensor:
        """(batch or 1, 1, queries, keys) bool: which keys are near a query's own, or are among the first."""
        own = own_keys(call, "local-mask", paired=self.paired)
        s = torch.arange(call.keys, device=call.value.device)
        t = s[None, : call.queries] if own is None else own
        distance = t[:, None, :, None] - s
        near = distance.abs() < self.window
        if self.first:
            near = near | (self._place(call) < self.first)
        return near & (distance >= 0) if self.past else near

    def _place(self, call: Call) -> Tensor:
        """(batch or 1, 1, 1, keys): how many real tokens come before each key; padding is what no query sees."""
        if self.own is not None and call.queries < call.keys >= self.own:
            raise EditError(
                f"local-mask with first={self.first} needs to know which keys are the first, and in {call.place.path}, "
                f"with a window of {self.own} of its own, they are out of sight or out of the cache: use first=0, or "
                "run it without a cache."
            )
        seen = seen_in(call)
        if seen is None:
            return torch.arange(call.keys, device=call.value.device)[None, None, None]
        real = seen.any(1, keepdim=True).any(-2, keepdim=True).expand(-1, -1, -1, call.keys)
        return real.long().cumsum(-1) - real.long()


@remedy(
    "local-mask",
    "each query sees the keys near it",
    addresses=("rank-collapse-depth", "context-dilution"),
    acts_on="attention",
    exactness="changes-function",
    formula="s_ts = −∞ where |t − s| ≥ w (both), or unless 0 ≤ t − s < w (past), beside the model's own mask",
    papers=(
        "Wu, Ajorlou, Wang, Jegelka, Jadbabaie: On the Role of Attention Masks and LayerNorm in Transformers, NeurIPS "
        "2024, arXiv 2405.18781",
    ),
    keys=("wu_masks_layernorm",),
    parameters=(
        Parameter("window", "w; none for half of the tokens of the batch", None, kind="integer", low=1, optional=True),
        Parameter("side", "which keys are near", "both", kind="choice", choices=("both", "past")),
        Parameter(
            "first", "how many of the first keys all go on seeing: class tokens, sinks", 0, kind="integer", low=0
        ),
    ),
    limits=(
        "It slows collapse and does not prevent it; what is farther than w tokens away is reached through several "
        "layers.",
        "Nearness is that of positions in the sequence, also for patches of an image.",
        "What no query of a call sees is padding and is none of the `first`. A model that has a window of its own is "
        "refused `first` beside a cache from as many keys on as the window shows: which were the first is not known "
        "then. A window that is wider than the batch is known where the module or its settings state it.",
        LIMIT,
        "Kernels that take no mask (`flash_attention_2`) are refused.",
    ),
    cost=(
        "a mask of T² numbers per call: fused kernels that take masks stay, those for causality alone do not; time "
        "is not "
        "saved; no parameters"
    ),
)
def local_mask(patient: Patient, *, window: int | None = None, side: str = "both", first: int = 0) -> Edit:
    """Hide what is far in every self-attention."""
    windows = own_windows(patient) if first else {}

    def make(site: Site) -> LocalMask:
        wide = max(1, max(call.keys for call in site.calls) // 2) if window is None else window
        return LocalMask(wide, first, past=side == "past", paired=paired(site), own=windows.get(site.path))

    return patient.rewrite("local-mask", before=make)
