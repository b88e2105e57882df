"""Softpick: a rectified softmax, whose rows may sum to less than 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.scores import Rows, attended, clear_of_sinks, scores
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["Softpick", "softpick", "softpicked"]


def softpicked(s: Tensor, seen: Tensor | None = None, *, epsilon: float = 1e-6) -> Tensor:
    """A_ts = relu(e^{s_ts} − 1)/(Σ_r |e^{s_tr} − 1| + ε), over what is visible.

    Args:
        s: (…, queries, keys) scores.
        seen: which are visible; None for all.
        epsilon: ε, so that a row of zeros stays one.

    Returns:
        The map; 0 where hidden and where s ≤ 0; rows sum to at most 1.
    """
    if seen is not None:
        s = torch.where(seen, s, 0.0)  # e⁰ − 1 is nothing in the sum either
    m = s.amax(-1, keepdim=True).clamp(min=0).detach()
    e = torch.exp(s - m) - torch.exp(-m)
    return torch.relu(e) / (e.abs().sum(-1, keepdim=True) + epsilon * torch.exp(-m))


class Softpick:
    """Puts softpick in the place of the softmax.

    Args:
        epsilon: ε.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, call: Call) -> Call:
        """The call with its map, or with what computes its output so."""
        if call.query is None:
            return call.change(weights=self._weigh(call, slice(None)))
        clear_of_sinks(call)
        return call.change(attend=self._attend)

    def _attend(self, call: Call) -> Tensor:
        return attended(call, self._weigh)

    def _weigh(self, call: Call, rows: Rows) -> Tensor:
        s, seen = scores(call, rows)
        return softpicked(s, seen, epsilon=self.epsilon)


@remedy(
    "softpick",
    "a rectified softmax without a need for sinks",
    addresses=("sinks",),
    acts_on="attention",
    exactness="changes-function",
    formula="A_ts = relu(e^{s_ts} − 1)/(Σ_r |e^{s_tr} − 1| + ε)",
    papers=("Softpick: No Attention Sink, No Massive Activations with Rectified Softmax, arXiv 2504.20966",),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("epsilon", "ε", 1e-6, above=0.0, high=1.0),),
    limits=(
        "Rows sum to less than 1: a trained model must be trained further.",
        "A query none of whose scores is positive returns 0, and has no gradient through what it does not see.",
        "The authors withdrew perplexities of their first version; parity is not kept at 1.8 B parameters or long "
        "contexts.",
        "The map is computed here, and dropout of attention weights is left out.",
        "It is no softmax: `examine` does not see maps of a model that has it.",
    ),
    cost=(
        "the fused kernel is lost: T² scores are made in plain operations, at most 32 million at once; beyond that by "
        "blocks of queries, computed a second time in the backward pass; no parameters"
    ),
)
def softpick(patient: Patient, *, epsilon: float = 1e-6) -> Edit:
    """Put softpick in the place of the softmax of every self-attention."""

    def make(site: Site) -> Softpick:
        return Softpick(epsilon)

    return patient.rewrite("softpick", before=make)
