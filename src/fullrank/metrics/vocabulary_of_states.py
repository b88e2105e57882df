"""The vocabulary of states: tokens of one sequence, sequences of a batch."""

import math
from typing import Final

from fullrank.metrics.definition import Definition, Invariance, Level

__all__ = ["STATES", "state"]

_ALL: Final = frozenset[Invariance]({"token_permutation", "rotation", "scale"})
_NO_ROTATION: Final = frozenset[Invariance]({"token_permutation", "scale"})
_SHARE: Final = (0.0, 1.0)


def state(
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
    """An entry of a metric of states; by default a share of one sequence, indifferent to labels, rotation and scale."""
    return Definition(name, definition, unit, range, healthy, collapsed, null, source, level, False, cost, invariances)


_TOKENS = (
    state(
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
    state(
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
    state(
        "residual",
        "Share of the signal that is not the token mean, ‖X − 1x̄ᵀ‖_F / ‖X‖_F. For tokens of equal length it is "
        "√((1 − 1/T)(1 − ρ)).",
        healthy="near 1",
        collapsed="0: every token is the mean; below 8 ε of the dtype it is rounding",
        null="√(1 − 1/T)",
        source="dong (2103.03404), with the token mean and the Frobenius norm",
    ),
    state(
        "update_share",
        "How much a block changes the stream, ‖X_ℓ − X_{ℓ−1}‖_F / ‖X_{ℓ−1}‖_F.",
        range=(0.0, math.inf),
        healthy="clearly above 0",
        collapsed="0: the block does nothing (dead depth)",
        null="≈ √2 for two unrelated states of equal size",
        source="residual_scaling (2502.05795)",
    ),
    state(
        "neighbour_cosine",
        "Cosine between the states before and after a block, each read as one long vector: ⟨X_ℓ, X_{ℓ−1}⟩_F / "
        "(‖X_ℓ‖_F ‖X_{ℓ−1}‖_F). Large tokens weigh more than in a mean of cosines per token.",
        range=(-1.0, 1.0),
        healthy="below 1",
        collapsed="1: the block changes at most the size (dead depth)",
        null="0 ± 1/√(T d) for two unrelated states",
        source="residual_scaling (2502.05795)",
    ),
    state(
        "identity_distance",
        "Sine of the angle between what is particular to the tokens now and before the first block: √(1 − c²) with c "
        "the Frobenius cosine of X_ℓ − 1x̄_ℓᵀ and X_0 − 1x̄_0ᵀ. A network that does nothing keeps every profile: this "
        "says whether that is why.",
        range=(0.0, 1.0),
        healthy="clearly above 0 after the last block",
        collapsed="0: the blocks hand on what they were given",
        null="≈ 1 − 1/(2 T d) for two unrelated states",
        source="definition",
    ),
    state(
        "span_novelty",
        "Share of ‖X_ℓ‖² outside the row space of the input states X_0: feature directions that no mixing of the "
        "input tokens can give. Not defined where T ≥ d.",
        healthy="above 0 and rising over depth",
        collapsed="0: nothing but mixtures of the input",
        null="1 − T/d for unrelated states",
        source="head_channel (2604.23681)",
        cost="O(T² d), once per input",
    ),
    state(
        "channel_entropy",
        "Entropy of the energy over channels, −Σ_c e_c log e_c / log d, with e_c the share of ‖X‖² in channel c.",
        healthy="near 1: all channels used alike",
        collapsed="0: one channel carries everything (rogue dimensions)",
        null="≈ 1 − 1/(T log d)",
        source="definition; rogue dimensions: Timkey and van Schijndel 2021 (2109.04404)",
        invariances=_NO_ROTATION,
    ),
    state(
        "max_to_median",
        "Largest |x| over the median |x| of all entries.",
        range=(1.0, math.inf),
        healthy="below a few tens",
        collapsed="1000 and more: massive activations",
        null="≈ √(2 log(T d)) / 0.67; 8 for T d = 10⁶",
        source="oversmoothing_fixes (massive activations: Sun et al. 2024)",
        invariances=_NO_ROTATION,
    ),
    state(
        "max_abs",
        "Largest |x| of all entries: what the dtype that holds the states must reach. Over sequences the largest, not "
        "the mean.",
        unit="that of the states",
        range=(0.0, math.inf),
        healthy="far below the largest number of the dtype (65504 for float16)",
        collapsed="that number: the next batch overflows",
        null="≈ √(2 log(T d)) for entries of unit variance",
        source="definition",
        invariances=frozenset[Invariance]({"token_permutation"}),
    ),
    state(
        "max_abs_position",
        "Index, among the real tokens, of the one that holds the largest |x|. Over sequences the most frequent one.",
        unit="position",
        range=(0.0, math.inf),
        healthy="any",
        collapsed="that of an attention sink (see sink_position) where it holds massive activations",
        null="any",
        source="oversmoothing_fixes (massive activations: Sun et al. 2024)",
        invariances=frozenset[Invariance]({"scale"}),
    ),
    state(
        "distinct_at_dtype",
        "Share of the pairs of tokens whose vectors still differ, exactly, in the dtype the model runs in.",
        healthy="1",
        collapsed="0: all tokens are one number to the last bit",
        null="1",
        source="definition",
        cost="O(T d log T)",
        invariances=frozenset[Invariance]({"token_permutation"}),
    ),
    state(
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
    state(
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
    state(
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
    state(
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
    state(
        "shared_energy",
        "Share of ‖X‖² in the mean over all tokens of all sequences, N‖m‖²/‖X‖²: a bias or rogue dimensions, "
        "harmless. Adds to 1 with sequence_energy and token_energy; needs two sequences.",
        healthy="small, or steady over depth",
        collapsed="1: every token of every input is the same",
        null="1/N for N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
    state(
        "sequence_energy",
        "Share of ‖X‖² in what the tokens of one sequence have in common beyond the batch mean, Σ_s n_s‖x̄_s − "
        "m‖²/‖X‖²: a signal of the whole sequence, often wanted. Needs two sequences.",
        healthy="depends on the task; high at the end of a sentence encoder",
        collapsed="1: tokens of a sequence have merged, sequences still differ",
        null="(S − 1)/N for S sequences of N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
    state(
        "token_energy",
        "Share of ‖X‖² that is particular to a token, Σ‖x_st − x̄_s‖²/‖X‖².",
        healthy="near 1",
        collapsed="0: tokens of a sequence have merged",
        null="1 − S/N for S sequences of N tokens in all",
        source="analysis of variance, between and within sequences",
        level="batch",
    ),
)

STATES: Final = (*_TOKENS, *_BATCH)
