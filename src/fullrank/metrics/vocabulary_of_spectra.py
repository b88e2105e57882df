"""The vocabulary of spectra: ranks, uncentred and centred, and the gaps of a set of vectors."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from fullrank.metrics.definition import Definition
from fullrank.metrics.vocabulary_of_states import state

__all__ = ["SPECTRA"]

_SHAPE: Final = (1.0, math.inf)

_SPECTRAL = (
    state(
        "stable_rank",
        "‖X‖_F² / ‖X‖₂², the energy in units of the strongest direction.",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1: one direction holds all energy",
        null="T d / (√T + √d)² for large sizes",
        source="batchnorm (2003.01652)",
    ),
    state(
        "gram_stable_rank",
        "Stable rank of XXᵀ, Σσ⁴ / σ₁⁴ (what the code of Mind the Gap plots).",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1; tokens of mean cosine ρ > 0 give 1 + (1−ρ)²(1 + T/d)/(ρ²T) before any layer",
        null="T d (T + d) / (√T + √d)⁴ for large sizes",
        source="mind_the_gap (2410.07799)",
    ),
    state(
        "effective_rank",
        "exp H(σ / Σσ), the exponential of the entropy of the normalised singular values.",
        range=_SHAPE,
        healthy="a good part of min(T, d)",
        collapsed="1",
        null="by simulation (null_value); .9 of d for T = 2 d",
        source="Roy and Vetterli 2007; RankMe 2023",
    ),
    state(
        "spectral_entropy_rank",
        "exp H(σ² / Σσ²), the exponential of the entropy of the energy over principal directions.",
        range=_SHAPE,
        healthy="a good part of min(T, d)",
        collapsed="1",
        null="by simulation (null_value)",
        source="definition",
    ),
    state(
        "participation_ratio",
        "(Σσ²)² / Σσ⁴: over how many directions the energy is spread.",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1",
        null="≈ T d / (T + d + 1)",
        source="batchnorm (2003.01652)",
    ),
    state(
        "numerical_rank",
        "#{σ > σ₁ · max(T, d) · ε}, ε that of the run's dtype. With skip connections it stays full through a "
        "collapse: never read it alone.",
        range=(0.0, math.inf),
        healthy="min(T, d)",
        collapsed="1",
        null="min(T, d)",
        source="head_channel (2604.23681)",
    ),
    state(
        "soft_rank",
        "rank_τ with τ = ½: #{σ² ≥ τ‖X‖_F² / d}, directions that carry at least half their fair share of the energy.",
        range=(0.0, math.inf),
        healthy="many",
        collapsed="1",
        null="by simulation (null_value)",
        source="batchnorm (2003.01652)",
    ),
)
_AFFINE = {
    "numerical_rank": {
        "definition": "numerical_rank of X − 1x̄ᵀ: the affine rank, the dimension of the affine hull of the tokens "
        "(threshold relative to σ₁ of X, since rounding is).",
        "null": "min(T − 1, d)",
    },
    "gram_stable_rank": {"collapsed": "1: one direction besides the mean"},
}


def _spectral() -> Iterator[Definition]:
    for uncentered in _SPECTRAL:
        least = 0.0 if uncentered.name in ("numerical_rank", "soft_rank") else 1.0
        entry = replace(
            uncentered,
            unit="directions",
            range=(least, math.inf),
            cost="O(T d min(T, d)), shared by all ranks",
        )
        yield entry
        centered = {
            "name": f"centered_{entry.name}",
            "definition": f"{entry.name} of X − 1x̄ᵀ, the states without their mean token: {entry.definition}",
            "null": f"as {entry.name} with T − 1 for T",
            "collapsed": f"{entry.collapsed} besides the mean",
        }
        yield replace(entry, **(centered | _AFFINE.get(entry.name, {})))  # type: ignore[arg-type]


_SAMPLES = (
    state(
        "orthogonality_gap",
        "‖XXᵀ/‖X‖_F² − I/n‖_F of n vectors: how far they are from orthogonal and equally long.",
        healthy="near 0",
        collapsed="√(1 − 1/n): all vectors are parallel",
        null="≈ √((n + 1)/(n d))",
        source="batchnorm (2106.03970)",
        level="sample",
        cost="O(n d min(n, d))",
    ),
    state(
        "isometry_gap",
        "log mean λ − mean log λ over the eigenvalues λ of XXᵀ, n vectors: −log of the isometry.",
        range=(0.0, math.inf),
        healthy="near 0",
        collapsed="∞: the vectors have become dependent (always so for n > d)",
        null="by simulation (null_value); ≈ (n + 1)/(2 d) for n ≪ d",
        source="batchnorm (2305.18399)",
        unit="nats",
        level="sample",
        cost="O(n d min(n, d))",
    ),
)

SPECTRA: Final = (*_spectral(), *_SAMPLES)
