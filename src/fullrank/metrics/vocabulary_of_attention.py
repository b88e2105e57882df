"""The vocabulary of attention: maps of one head, and the heads of a layer together."""

import math
from typing import Final

from fullrank.metrics.definition import Definition, Invariance

__all__ = ["ATTENTION"]

_LABELS: Final = frozenset[Invariance]({"token_permutation"})
_ALL: Final = frozenset[Invariance]({"token_permutation", "rotation", "scale"})
_SHARE: Final = (0.0, 1.0)
_POSITIVE: Final = (0.0, math.inf)


def _map(
    name: str,
    definition: str,
    *,
    healthy: str,
    collapsed: str,
    null: str,
    source: str,
    unit: str = "1",
    range: tuple[float, float] = _POSITIVE,  # noqa: A002 - the name of the field
    per_head: bool = True,
    cost: str = "O(T S d), one streaming pass shared by all row statistics",
    invariances: frozenset[Invariance] = _LABELS,
) -> Definition:
    return Definition(
        name, definition, unit, range, healthy, collapsed, null, source, "attention", per_head, cost, invariances
    )


_SPECTRUM_COST = "a few products with A (block Krylov); O(T S min(T, S)) where the map is kept"

_SPECTRA = (
    _map(
        "attention_s1",
        "Largest singular value of the attention map A.",
        healthy="near 1",
        collapsed="√T for a pure sink; → 2 for plain causal averaging",
        null="1 + O(1/T) for independent rows with full visibility",
        source="mind_the_gap (2410.07799)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "attention_s2",
        "Second singular value of the attention map: what survives beside the leading average.",
        healthy="a good part of 1",
        collapsed="0: all queries read the same",
        null="2 √(Y₂ − 1/T) for independent rows of logit std below .7, else that of the permuted map",
        source="mind_the_gap (2410.07799)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "outlier_share",
        "s₁² / ‖A‖_F², the share of the map's energy in its leading direction.",
        range=_SHARE,
        healthy="well below 1",
        collapsed="1: the map has rank one",
        null="≈ 1/(T Y₂) for independent rows",
        source="mind_the_gap (2410.07799)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "bulk_excess",
        "s₂ over its null, the mean s₂ of the same map with the visible entries of every row shuffled.",
        healthy="well above 1: rows have structure (position, content)",
        collapsed="1: rows as good as random; below 1: rows that agree",
        null="1",
        source="mind_the_gap (2410.07799); permuted null",
        cost=_SPECTRUM_COST,
        invariances=frozenset[Invariance](),  # exact only up to the draw of the null
    ),
    _map(
        "attention_stable_rank",
        "‖A‖_F² / ‖A‖₂², the stable rank of the map (the inverse of outlier_share).",
        unit="directions",
        range=(1.0, math.inf),
        healthy="many times 1",
        collapsed="1: the map has rank one",
        null="≈ T Y₂ for independent rows",
        source="mind_the_gap (2410.07799)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "uniform_distance",
        "‖A − U‖₂, U the plain average over the visible keys: the gain of what attention adds to averaging.",
        healthy="a good part of 1",
        collapsed="0: attention only averages",
        null="≈ 2 √(Y₂ − 1/T) for independent rows",
        source="mind_the_gap (2410.07799)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "smoothing_gain",
        "‖(I − J)A‖₂, J the mean over queries: the largest factor by which differences between tokens come out. Exact "
        "where published bounds never fall below 1; can exceed 1.",
        healthy="near 1",
        collapsed="0: one pass makes all tokens equal",
        null="≈ 2 √(Y₂ − 1/T) for independent rows with full visibility",
        source="oversmoothing_fixes (2203.05962)",
        cost=_SPECTRUM_COST,
    ),
    _map(
        "branch_energy",
        "‖(A − U)V‖_F² / ‖AV‖_F²: the share of a head's output that is not the plain average of the visible values. "
        "Near 0, centring the attention would switch the head off.",
        healthy="near 1",
        collapsed="0: the head only averages",
        null="(1−ρ)(Y₂ − 1/T) / (ρ + (1−ρ)Y₂) for values of cosine ρ",
        source="mind_the_gap (2410.07799)",
        cost="one product with A",
        invariances=_ALL,
    ),
    _map(
        "contrast_gain",
        "√(mean_t ‖o_t − ō‖² / mean_s ‖v_s − v̄‖²), o = AV: how much of the values' differences from token to token "
        "comes out. That is the gain of their non-mean part; the gain of their mean is 1, as rows sum to one. What "
        "smoothing_gain bounds, for the values that were there.",
        healthy="a good part of 1, at every context",
        collapsed="0: all queries get the same; falling like 1/√T: a long context is averaged",
        null="√(Y₂ − 1/T), that is √((exp s² − 1)/T), for independent rows of logit std s and values that know nothing "
        "of the keys; beyond T ≈ d it stays near s/√d",
        source="mind_the_gap (2410.07799)",
        cost="one product with A, shared with branch_energy",
        invariances=_ALL,
    ),
)

_ROWS = (
    _map(
        "entropy",
        "Mean over queries of the row entropy H_t = −Σ_s A_ts log A_ts. Low entropy alone is no collapse: read it "
        "with selectivity.",
        unit="nats",
        healthy="between",
        collapsed="log of the number of visible keys (averages everything) or 0 (one key)",
        null="log(T!)/T for causal uniform attention, log T for full",
        source="entropy (2303.06296)",
    ),
    _map(
        "normalized_entropy",
        "Mean over queries of H_t / log n_t, n_t the number of keys that query t sees. Every GPT-2 or Llama has .999 "
        "to 1 at default initialisation, and trains.",
        range=_SHARE,
        healthy="between",
        collapsed="1: plain averaging (rank collapse); 0: one key (entropy collapse, or a pointer)",
        null="≈ 1 − b²/2 for logits of std b √log n, b small",
        source="entropy (2410.13060)",
    ),
    _map(
        "effective_keys",
        "Mean over queries of exp H_t: over how many keys a uniform row of the same entropy would spread.",
        unit="keys",
        range=(1.0, math.inf),
        healthy="between",
        collapsed="all visible keys, or 1",
        null="the number of visible keys for zero logits",
        source="entropy (2303.06296)",
    ),
    _map(
        "selectivity",
        "How much queries differ in what they look at: mean over queries of the divergence KL(A_t ‖ average row "
        "restricted to the keys visible to t). Tells a pointer (high) from a sink (low) at the same entropy.",
        unit="nats",
        healthy="high: each query has its own keys (at most log T)",
        collapsed="0: all queries look at the same keys",
        null="that of the permuted map (permuted_null)",
        source="divergence of rows from their mean (Jensen and Shannon; Lin 1991)",
    ),
    _map(
        "inverse_participation",
        "Y₂ = mean over queries of Σ_s A_ts².",
        range=_SHARE,
        healthy="between",
        collapsed="1/n for n visible keys (averages everything), or 1 (one key)",
        null="≈ T^(b²−1) for logit std b √log T, b < .7",
        source="giorlandino_goldt (2505.24333)",
    ),
    _map(
        "logit_std",
        "Mean over queries of the standard deviation of the visible, scaled logits. Does not saturate where the "
        "entropy does.",
        unit="logits",
        healthy="of order 1",
        collapsed="0: attention averages; well above 2 √log T: one key takes all",
        null="0.3 for standard deviation .02 and width 768 at initialisation",
        source="giorlandino_goldt (2505.24333)",
    ),
    _map(
        "log_context_gauge",
        "b̂ = mean over queries of std_s(logits) / √log n_t, n_t the number of visible keys: sharpness against "
        "context length.",
        healthy="around √2/2 to √2",
        collapsed="near 0: a long context averages; far above √2: each query attends to O(1) keys",
        null="transition at √2, finite-context effects from √2/2; .12 for GPT-2's initialisation at T = 512",
        source="giorlandino_goldt (2505.24333)",
    ),
    _map(
        "max_logit",
        "Largest visible, scaled logit of any query (a maximum, not a mean).",
        unit="logits",
        range=(-math.inf, math.inf),
        healthy="below a few tens",
        collapsed="100 and more: entropy collapse, loss spikes",
        null="≈ logit std · √(2 log(T S))",
        source="oversmoothing_fixes (QK-Clip, softcap)",
    ),
    _map(
        "sink_mass",
        "Largest column mean, max_s mean_t A_ts: the share of attention that the most attended key takes.",
        range=_SHARE,
        healthy="a few times 1/S",
        collapsed="1: all queries attend to one key",
        null="≈ 1/S (full), about log(S)/S for the first key of causal uniform attention over all rows",
        source="oversmoothing_fixes (sinks)",
    ),
    _map(
        "sink_position",
        "Index of the key with the largest column mean (see sink_mass).",
        unit="position",
        healthy="any",
        collapsed="0 in most trained decoders",
        null="any",
        source="oversmoothing_fixes (sinks)",
        invariances=frozenset[Invariance](),
    ),
)

_HEADS = (
    _map(
        "head_similarity",
        "Mean cosine over pairs of heads of one layer of what they write to the stream, A_h V_h W_O^h, each read as "
        "one long vector.",
        range=(-1.0, 1.0),
        healthy="near 0",
        collapsed="1: all heads write the same",
        null="0 ± √(2/(T d))/H",
        source="definition",
        per_head=False,
        cost="O(H T d)",
        invariances=_ALL,
    ),
    _map(
        "nearest_head_similarity",
        "Largest cosine of what a head writes to the stream, A_h V_h W_O^h as one long vector, with what another "
        "head of its layer writes. At 1 one of the two can be dropped and the other's W_O^h multiplied.",
        range=(-1.0, 1.0),
        healthy="well below 1",
        collapsed="1: another head of the layer writes the same",
        null="about √(2 log H/(T d)); √(2 log H/d) where all tokens are read alike",
        source="definition",
        cost="O(H² T d)",
        invariances=_ALL,
    ),
    _map(
        "nearest_head",
        "Index of the head that writes most alike (see nearest_head_similarity).",
        unit="index",
        healthy="any",
        collapsed="any: it says which, not whether",
        null="any",
        source="definition",
        cost="O(H² T d)",
        invariances=_ALL,
    ),
    _map(
        "head_ambiguity",
        "Degrees of freedom of the heads' outputs that a stated linear readout B of their sum does not see, n (H d_k "
        "− rank(W_O B)); with the condition number of W_O and the principal angles between heads' row spaces. 0 for "
        "the full readout of a square invertible W_O.",
        unit="degrees of freedom",
        healthy="0 for the full readout",
        collapsed="n (H − 1) d_k for a readout of width d_k",
        null="0 for a random square W_O with full readout",
        source="head_channel (2604.23681)",
        per_head=False,
        cost="O(d³)",
        invariances=frozenset[Invariance]({"rotation", "scale"}),
    ),
    _map(
        "unselectable_keys",
        "Share of a head's keys that no query can attend to most, because they lie in the convex hull of the others "
        "(taken after W_K, where LayerNorm's guarantee no longer holds).",
        range=_SHARE,
        healthy="0",
        collapsed="near 1: most keys are out of reach",
        null="near 0 for d_k ≥ 12 and a few dozen Gaussian keys, .4 to .7 for d_k = 3",
        source="layernorm_expressivity (2305.02582)",
        cost="up to one linear programme per key",
        invariances=_ALL,
    ),
)

ATTENTION: Final = (*_SPECTRA, *_ROWS, *_HEADS)
