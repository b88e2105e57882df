"""Centred attention: what attention adds to averaging what is visible, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.remedies.attention.branch_gain import GAINS, centred_attention
from fullrank.remedies.attention.visible_mean import visible_mean
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["center_attention"]


@remedy(
    "center-attention",
    "attention without its uniform part",
    addresses=("rank-collapse-width", "rank-collapse-depth", "averaging-heads", "context-dilution"),
    acts_on="attention",
    exactness="changes-function",
    formula=(
        "A ← g (A − U); U_ts = 1/#visible(t). (A − U)V = AV − the mean of the visible values: one vector for full "
        "attention (U = J), the running mean where causal, the mean over the window where windowed; padding is left out"
    ),
    papers=(
        "Naderi, Nait Saada, Tanner: Mind the Gap: a Spectral Analysis of Rank Collapse and Signal Propagation in "
        "Attention Layers, ICML 2025, arXiv 2410.07799 (full attention; the causal form is not in it)",
        "Ali, Galanti, Wolf: Centered Self-Attention Layers, arXiv 2306.01610 (its equation was not checked)",
    ),
    keys=("mind_the_gap", "oversmoothing_fixes"),
    parameters=GAINS,
    limits=(
        "Needs logits of order one, or a gain: ‖(A−J)V‖²/‖AV‖² ≈ (1−ρ)(Y₂−1/T)/(ρ+(1−ρ)Y₂), where Y₂ = E Σ_s A_ts² and "
        "ρ is the mean cosine of the values. Under small initialisations (logit std ≪ 1) it switches attention off.",
        "It removes one direction. Where several eigenvalues are near 1 the others stay: see deflate-attention.",
        "The first tokens of a causal model get next to nothing from attention: the first one exactly 0.",
        "A trained model does not keep its function; its authors' own curves show no gain in final loss.",
        "Measured gains are those of the batch and the weights at the moment of applying; they are stored as buffers.",
        "Where the model adds a learned sink to its softmax, rows of A sum to less than 1 and those of U still to 1.",
    ),
    cost=(
        "a mean over values per call, O(T), also where causal, padded or windowed by the kernel's flags; a mask with a "
        "row for every query costs one more product, O(T²). Fused kernels stay; no parameters, unless gains are learnt"
    ),
)
def center_attention(patient: Patient, *, gain: str = "none", factor: float = 1.0, learn: bool = False) -> Edit:
    """Subtract the visible mean of the values from what every self-attention hands on."""
    return centred_attention(
        patient,
        "center-attention",
        less_mean_of_values,
        gain=gain,
        factor=factor,
        learn=learn,
        sites=patient.self_attention,
    )


def less_mean_of_values(call: Call, output: Tensor) -> Tensor:
    """(A − U)V, from AV: after the kernel, where dropout of the map has no part in U, and no value is copied."""
    return output - visible_mean(call)
