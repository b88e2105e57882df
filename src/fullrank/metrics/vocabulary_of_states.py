"""The vocabulary of states: tokens of a sequence, sequences of a batch, sets of vectors."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from fullrank.metrics.definition import Definition, Invariance, Level

__all__ = ["STATES"]

_ALL: Final = frozenset[Invariance]({"token_permutation", "rotation", "scale"})
_NO_ROTATION: Final = frozenset[Invariance]({"token_permutation", "scale"})
_SHAPE: Final = (1.0, math.inf)
_SHARE: Final = (0.0, 1.0)


def _state(
    name: str,
    definition: str,
    *,
    healthy: str,
    collapsed: str,
    null: str,
    source: str,
    unit: str = "1",
    range: tuple[float, float] = _SHARE,  # noqa: A002 - the name of the field
    level: Level = "token",
    cost: str = "O(T d)",
    invariances: frozenset[Invariance] = _ALL,
) -> Definition:
    return Definition(name, definition, unit, range, healthy, collapsed, null, source, level, False, cost, invariances)


_TOKENS = (
    _state(
        "rms",
        "Root mean square of the entries of the states, √(Σ x² / (T d)): how large the signal is.",
        unit="that of the states",
        range=(0.0, math.inf),
        healthy="of order 1, steady or growing slowly over depth",
        collapsed="0 (vanished) or ∞ (exploded)",
        null="1 for entries of unit variance",
        source="definition",
        invariances=frozenset[Invariance]({"token_permutation", "rotation"}),
    ),
    _state(
        "similarity",
        "ρ, the mean cosine over all pairs of different tokens of one sequence. High values have three causes (a bias "
        "shared by all inputs, a signal shared by the sequence, tokens that merge): read it with similarity_across "
        "and the energy shares.",
        range=(-1.0, 1.0),
        healthy="near 0",
        collapsed="1: all tokens point the same way",
        null="0 ± √(2/d)/T",
        source="noci (2206.03126)",
    ),
    _state(
        "residual",
        "Share of the signal that is not the token mean, ‖X − 1x̄ᵀ‖_F / ‖X‖_F. For tokens of equal length it is "
        "√((1 − 1/T)(1 − ρ)).",
        healthy="near 1",
        collapsed="0: every token is the mean; below 8 ε of the dtype it is rounding",
        null="√(1 − 1/T)",
        source="dong (2103.03404), with the token mean and the Frobenius norm",
    ),
    _state(
        "update_share",
        "How much a block changes the stream, ‖X_ℓ − X_{ℓ−1}‖_F / ‖X_{ℓ−1}‖_F.",
        range=(0.0, math.inf),
        healthy="clearly above 0",
        collapsed="0: the block does nothing (dead depth)",
        null="≈ √2 for two unrelated states of equal size",
        source="residual_scaling (2502.05795)",
    ),
    _state(
        "neighbour_cosine",
        "Cosine between the states before and after a block, each read as one long vector: ⟨X_ℓ, X_{ℓ−1}⟩_F / "
        "(‖X_ℓ‖_F ‖X_{ℓ−1}‖_F). Large tokens weigh more than in a mean of cosines per token.",
        range=(-1.0, 1.0),
        healthy="below 1",
        collapsed="1: the block changes at most the size (dead depth)",
        null="0 ± 1/√(T d) for two unrelated states",
        source="residual_scaling (2502.05795)",
    ),
    _state(
        "span_novelty",
        "Share of ‖X_ℓ‖² outside the row space of the input states X_0: feature directions that no mixing of the "
        "input tokens can give. Not defined where T ≥ d.",
        healthy="above 0 and rising over depth",
        collapsed="0: nothing but mixtures of the input",
        null="1 − T/d for unrelated states",
        source="head_channel (2604.23681)",
        cost="O(T² d), once per input",
    ),
    _state(
        "channel_entropy",
        "Entropy of the energy over channels, −Σ_c e_c log e_c / log d, with e_c the share of ‖X‖² in channel c.",
        healthy="near 1: all channels used alike",
        collapsed="0: one channel carries everything (rogue dimensions)",
        null="≈ 1 − 1/(T log d)",
        source="definition; rogue dimensions: Timkey and van Schijndel 2021 (2109.04404)",
        invariances=_NO_ROTATION,
    ),
    _state(
        "max_to_median",
        "Largest |x| over the median |x| of all entries.",
        range=(1.0, math.inf),
        healthy="below a few tens",
        collapsed="1000 and more: massive activations",
        null="≈ √(2 log(T d)) / 0.67; 8 for T d = 10⁶",
        source="oversmoothing_fixes (massive activations: Sun et al. 2024)",
        invariances=_NO_ROTATION,
    ),
    _state(
        "distinct_at_dtype",
        "Share of the pairs of tokens whose vectors still differ, exactly, in the dtype the model runs in.",
        healthy="1",
        collapsed="0: all tokens are one number to the last bit",
        null="1",
        source="definition",
        cost="O(T d log T)",
        invariances=frozenset[Invariance]({"token_permutation"}),
    ),
    _state(
        "intrinsic_dimension",
        "Dimension of the cloud of tokens from the ratio of the distances to the second and the first neighbour "
        "(TwoNN, N / Σ log(r₂/r₁); GRIDE at larger scales), exact duplicates removed. Biased low in high dimension.",
        range=(0.0, math.inf),
        healthy="rises to a peak (about 10) in the middle of a trained network",
        collapsed="falls towards 0 as tokens merge into few clusters",
        null="by simulation (null_value); far below d: 8.4 for a true 10 at 1000 tokens",
        source="token_geometry (2501.10573)",
        unit="dimensions",
        cost="O(T² d)",
    ),
    _state(
        "neighbourhood_overlap",
        "Share of a token's k nearest neighbours (k = 2) that it keeps from one state to the next, mean over tokens.",
        healthy="between: neighbourhoods are reworked gradually",
        collapsed="1: the block moves nothing; k/(T − 1): it scrambles all",
        null="k/(T − 1) for unrelated states",
        source="token_geometry (2501.10573)",
        cost="O(T² d)",
    ),
)

_BATCH = (
    _state(
        "similarity_across",
        "Mean cosine over pairs of tokens of different sequences. As high as similarity: the agreement is common to "
        "all inputs; much lower: it belongs to the sequence.",
        range=(-1.0, 1.0),
        healthy="near 0",
        collapsed="1: every input gives the same state",
        null="0 ± √(2/d)/N for N tokens in all",
        source="Ethayarajh 2019 (1909.00512)",
        level="batch",
    ),
    _state(
        "similarity_standardized",
        "similarity within a sequence after every feature has been shifted and scaled to mean 0 and variance 1 over "
        "all tokens of the batch: without shared bias and rogue dimensions.",
        range=(-1.0, 1.0),
        healthy="near 0",
        collapsed="1 cannot be reached by one sequence alone; high: each sequence has become one token",
        null="≈ −1/N for N tokens in all",
        source="Timkey and van Schijndel 2021 (2109.04404)",
        level="batch",
        invariances=_NO_ROTATION,
    ),
    _state(
        "shared_energy",
        "Share of ‖X‖² in the mean over all tokens of all sequences, N‖m‖²/‖X‖²: a bias or rogue dimensions, "
        "harmless. Adds to 1 with sequence_energy and token_energy; needs two sequences.",
        healthy="small, or steady over depth",
        collapsed="1: every token of every input is the same",
        null="1/N for N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
    _state(
        "sequence_energy",
        "Share of ‖X‖² in what the tokens of one sequence have in common beyond the batch mean, Σ_s n_s‖x̄_s − "
        "m‖²/‖X‖²: a signal of the whole sequence, often wanted. Needs two sequences.",
        healthy="depends on the task; high at the end of a sentence encoder",
        collapsed="1: tokens of a sequence have merged, sequences still differ",
        null="(S − 1)/N for S sequences of N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
    _state(
        "token_energy",
        "Share of ‖X‖² that is particular to a token, Σ‖x_st − x̄_s‖²/‖X‖².",
        healthy="near 1",
        collapsed="0: tokens of a sequence have merged",
        null="1 − S/N for S sequences of N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
)

_SPECTRAL = (
    _state(
        "stable_rank",
        "‖X‖_F² / ‖X‖₂², the energy in units of the strongest direction.",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1: one direction holds all energy",
        null="T d / (√T + √d)² for large sizes",
        source="batchnorm (2003.01652)",
    ),
    _state(
        "gram_stable_rank",
        "Stable rank of XXᵀ, Σσ⁴ / σ₁⁴ (what the code of Mind the Gap plots).",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1; tokens of mean cosine ρ > 0 give 1 + (1−ρ)²(1 + T/d)/(ρ²T) before any layer",
        null="T d (T + d) / (√T + √d)⁴ for large sizes",
        source="mind_the_gap (2410.07799)",
    ),
    _state(
        "effective_rank",
        "exp H(σ / Σσ), the exponential of the entropy of the normalised singular values.",
        range=_SHAPE,
        healthy="a good part of min(T, d)",
        collapsed="1",
        null="by simulation (null_value); .9 of d for T = 2 d",
        source="Roy and Vetterli 2007; RankMe 2023",
    ),
    _state(
        "spectral_entropy_rank",
        "exp H(σ² / Σσ²), the exponential of the entropy of the energy over principal directions.",
        range=_SHAPE,
        healthy="a good part of min(T, d)",
        collapsed="1",
        null="by simulation (null_value)",
        source="definition",
    ),
    _state(
        "participation_ratio",
        "(Σσ²)² / Σσ⁴: over how many directions the energy is spread.",
        range=_SHAPE,
        healthy="many times 1",
        collapsed="1",
        null="≈ T d / (T + d + 1)",
        source="batchnorm (2003.01652)",
    ),
    _state(
        "numerical_rank",
        "#{σ > σ₁ · max(T, d) · ε}, ε that of the run's dtype. With skip connections it stays full through a "
        "collapse: never read it alone.",
        range=(0.0, math.inf),
        healthy="min(T, d)",
        collapsed="1",
        null="min(T, d)",
        source="head_channel (2604.23681)",
    ),
    _state(
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
        "definition": "numerical_rank of X − 1x̄ᵀ: the affine rank, the dimension of the affine hull of the tokens.",
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
    _state(
        "orthogonality_gap",
        "‖XXᵀ/‖X‖_F² − I/n‖_F of n vectors: how far they are from orthogonal and equally long.",
        healthy="near 0",
        collapsed="√(1 − 1/n): all vectors are parallel",
        null="≈ √((n + 1)/(n d))",
        source="batchnorm (2106.03970)",
        level="sample",
        cost="O(n d min(n, d))",
    ),
    _state(
        "isometry_gap",
        "log mean λ − mean log λ over the eigenvalues λ of XXᵀ, n vectors: −log of the isometry.",
        range=(0.0, math.inf),
        healthy="near 0",
        collapsed="∞: the vectors have become dependent (always so for n > d)",
        null="by simulation (null_value); ≈ n/(2 d) for n ≪ d",
        source="batchnorm (2305.18399)",
        unit="nats",
        level="sample",
        cost="O(n d min(n, d))",
    ),
)

STATES: Final = (*_TOKENS, *_spectral(), *_BATCH, *_SAMPLES)
