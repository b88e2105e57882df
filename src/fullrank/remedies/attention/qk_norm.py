"""QK-norm: queries and keys normalised by head before their scores are made."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.errors import RemedyError
from fullrank.remedies.attention.calibrating import Calibrated, calibrate
from fullrank.remedies.attention.scores import row_blocks, scores
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["QKNorm", "qk_norm", "row_spread"]

_EPS = 1e-6
_USUAL = {"rms": 1.0, "l2": 10.0}


class QKNorm(Calibrated):
    """s ← g_h ⟨q̂, k̂⟩: of norm √d and with the factor 1/√d (rms), or of norm 1 (l2).

    Args:
        heads: how many query heads.
        norm: `rms` or `l2`.
    """

    def __init__(self, heads: int, norm: str) -> None:
        super().__init__(heads, _USUAL[norm], learnable=True)
        self.norm = norm

    def measure(self, call: Call) -> Tensor:
        """The gain that keeps the spread of the scores over the keys, by head."""
        ones = torch.ones_like(self.per_head)
        before, after = row_spread(call), row_spread(self._normed(call, ones))
        return torch.where(after > 0, before / after.clamp(min=1e-30), 1.0).to(self.per_head)

    def forward(self, call: Call) -> Call:
        """The call with queries and keys normalised, and its scale."""
        return self._normed(call, self.present(call))

    def _normed(self, call: Call, gain: Tensor) -> Call:
        assert call.query is not None
        assert call.key is not None
        scale = call.query.shape[-1] ** -0.5 if self.norm == "rms" else 1.0
        query = self._direction(call.query) * gain[:, None, None].to(torch.promote_types(gain.dtype, torch.float32))
        key = self._direction(call.key)
        return call.change(query=query.to(call.query.dtype), key=key.to(call.key.dtype), scale=scale)

    def _direction(self, X: Tensor) -> Tensor:
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        square = X.square()
        size = square.mean(-1, keepdim=True) if self.norm == "rms" else square.sum(-1, keepdim=True)
        return X * torch.rsqrt(size + _EPS)


def row_spread(call: Call) -> Tensor:
    """The standard deviation of the scores over the keys that a query sees, its mean square over queries, by head.

    Args:
        call: the call.

    Returns:
        (heads,).
    """
    total = count = 0.0 * call.value.new_zeros(1).to(torch.promote_types(call.value.dtype, torch.float32))
    for rows in row_blocks(call):
        s, seen = scores(call, rows)
        here = torch.ones_like(s) if seen is None else seen.to(s.dtype).expand(s.shape)
        n = here.sum(-1, keepdim=True)
        s = torch.where(here > 0, s, 0.0)
        off = (s - s.sum(-1, keepdim=True) / n.clamp(min=1)) * here
        variance = off.square().sum(-1) / n[..., 0].clamp(min=1)
        several = (n[..., 0] > 1).to(s.dtype)
        total = total + (variance * several).sum((0, 2))
        count = count + several.sum((0, 2))
    return (total / count.clamp(min=1)).sqrt()


@remedy(
    "qk-norm",
    "queries and keys normalised by head, with a learned gain",
    addresses=("entropy-collapse", "numerics", "vanishing-or-exploding"),
    acts_on="attention",
    exactness="changes-function",
    formula="rms: s = g_h ⟨q/rms(q), k/rms(k)⟩/√d_k; l2: s = g_h ⟨q/‖q‖, k/‖k‖⟩; |s| ≤ g_h √d_k, or g_h",
    papers=(
        "Henry et al.: Query-Key Normalization for Transformers, Findings of EMNLP 2020 (not verified here)",
        "as in timm, x-transformers, and Qwen3, OLMo2 and Gemma3 of Hugging Face",
    ),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter("norm", "to norm √d_k (rms) or 1 (l2)", "rms", kind="choice", choices=("rms", "l2")),
        Parameter(
            "start",
            "the gain at first: such that the spread of the scores stays as it is on the batch (keep), or 1 for rms "
            "and "
            "10 for l2 (usual)",
            "keep",
            kind="choice",
            choices=("keep", "usual"),
        ),
    ),
    limits=(
        "The lengths of queries and keys are lost: a trained model must be trained further.",
        "The gain can grow in training, and undo the bound.",
        "One gain per head, not one per feature: queries and keys come after rotary embeddings, which those would not "
        "commute with.",
        "Not for models that softmax by themselves: their queries and keys are not seen.",
    ),
    cost="two norms per call; fused kernels stay; one parameter per head",
)
def qk_norm(patient: Patient, *, norm: str = "rms", start: str = "keep") -> Edit:
    """Normalise the queries and keys of every self-attention."""
    made: list[QKNorm] = []

    def make(site: Site) -> QKNorm:
        if site.first.width is None:
            raise RemedyError(f"{site.path} makes its softmax itself and shows no queries and keys; use softcap.")
        made.append(QKNorm(site.first.heads, norm))
        return made[-1]

    edit = patient.rewrite("qk-norm", before=make)
    if start == "keep":
        with edit.kept():
            calibrate(patient, made)
    return edit
