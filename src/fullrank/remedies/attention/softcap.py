"""Softcap: scores bent towards a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.scores import Rows, attended, clear_of_sinks, scores, seen_in
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["Softcap", "softcap"]


class Softcap:
    """s ← c tanh(s/c).

    Args:
        cap: c.
    """

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, call: Call) -> Call:
        """The call with its scores capped, or with what computes its output so."""
        if call.logits is not None:
            seen = seen_in(call)
            assert seen is not None
            return call.change(logits=torch.where(seen, self._bent(call.logits), call.logits))
        clear_of_sinks(call)
        return call.change(attend=self._attend)

    def _attend(self, call: Call) -> Tensor:
        return attended(call, self._weigh)

    def _weigh(self, call: Call, rows: Rows) -> Tensor:
        s, seen = scores(call, rows, self._bent)
        A = torch.softmax(s, -1)
        return A if seen is None else A * seen

    def _bent(self, s: Tensor) -> Tensor:
        return self.cap * torch.tanh(s / self.cap)


@remedy(
    "softcap",
    "scores bent towards a bound",
    addresses=("entropy-collapse", "numerics"),
    acts_on="attention",
    exactness="changes-function",
    formula="s ← c·tanh(s/c), before biases and masks",
    papers=("as in Gemma 2 of Hugging Face (c = 50)",),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("cap", "c, the bound on |s|", 50.0, above=0.0, high=1e6),),
    limits=(
        "Scores far beyond the cap have no gradient.",
        "Scores well below c change by about s³/(3c²): a model with small scores is nearly left alone.",
        "No kernel that is fused takes a cap through this interface: the map is computed here, and dropout of "
        "attention "
        "weights is left out.",
        "Position biases are capped too where the model softmaxes by itself.",
    ),
    cost=(
        "the fused kernel is lost: T² scores are made in plain operations, at most 32 million at once; beyond that by "
        "blocks of queries, computed a second time in the backward pass; no parameters"
    ),
)
def softcap(patient: Patient, *, cap: float = 50.0) -> Edit:
    """Cap the scores of every self-attention."""

    def make(site: Site) -> Softcap:
        return Softcap(cap)

    return patient.rewrite("softcap", before=make)
