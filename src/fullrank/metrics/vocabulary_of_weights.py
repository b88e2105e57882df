"""The vocabulary of weights: single matrices, and the two circuits of a head."""

import math
from typing import Final

from fullrank.metrics.definition import Definition, Invariance

__all__ = ["WEIGHTS"]

_ALL: Final = frozenset[Invariance]({"token_permutation", "rotation", "scale"})
_NO_SCALE: Final = frozenset[Invariance]({"token_permutation", "rotation"})
_SPECTRUM: Final = "O(out in min(out, in))"


def _weight(
    name: str,
    definition: str,
    *,
    healthy: str,
    collapsed: str,
    null: str,
    source: str,
    unit: str = "1",
    range: tuple[float, float] = (0.0, math.inf),  # noqa: A002 - the name of the field
    per_head: bool = False,
    cost: str = _SPECTRUM,
    invariances: frozenset[Invariance] = _ALL,
) -> Definition:
    return Definition(
        name, definition, unit, range, healthy, collapsed, null, source, "weight", per_head, cost, invariances
    )


WEIGHTS: Final = (
    _weight(
        "weight_rms",
        "Root mean square of a weight's entries, √(Σ w² / (out in)): the standard deviation an initialisation sets.",
        unit="that of the weight",
        healthy="of the order of 1/√in",
        collapsed="0 (the role does nothing) or ∞",
        null="what the initialisation set",
        source="condensation (2405.05409)",
        cost="O(out in)",
        invariances=_NO_SCALE,
    ),
    _weight(
        "condensation",
        "Mean |cosine| over pairs of different rows of a weight, the input weights of its outputs: training from small "
        "initial weights gathers them on few lines.",
        range=(0.0, 1.0),
        healthy="a few times the null",
        collapsed="1: all outputs see one and the same direction",
        null="√(2/(π in)) for independent Gaussian rows",
        source="condensation (2105.11686, 2510.06954)",
        cost="O(out² in)",
    ),
    _weight(
        "spectral_norm",
        "σ₁ of a weight, ‖W‖₂: the largest factor by which it lengthens a vector. The norms of W_Q and W_K bound how "
        "low the entropy of attention can go.",
        unit="that of the weight",
        healthy="of order 1",
        collapsed="∞: logits grow and attention becomes one-hot; 0: nothing passes",
        null="≈ std (√out + √in) for independent entries",
        source="entropy (2303.06296)",
        invariances=_NO_SCALE,
    ),
    _weight(
        "weight_stable_rank",
        "‖W‖_F² / ‖W‖₂², the stable rank of a weight.",
        unit="directions",
        range=(1.0, math.inf),
        healthy="a good part of min(out, in)",
        collapsed="1: one direction holds all",
        null="out in / (√out + √in)² for independent entries",
        source="condensation (2510.06954)",
    ),
    _weight(
        "weight_effective_rank",
        "exp H(σ/Σσ) of a weight's singular values: how many directions it uses.",
        unit="directions",
        range=(1.0, math.inf),
        healthy="a good part of min(out, in)",
        collapsed="1: one direction holds all",
        null="by simulation, .8 (square) to nearly 1 (one side much longer) of min(out, in)",
        source="condensation (2510.06954)",
    ),
    _weight(
        "qk_eigenvalue_variance",
        "Variance of the eigenvalues of a head's W_QK = W_Qᵀ W_K, mean|λ|² − |mean λ|², the zero ones included; rotary "
        "embeddings, biases and the scale of the logits left out.",
        unit="that of the weight to the fourth power",
        healthy="small: attention can settle on few tokens",
        collapsed="large: attention spreads evenly or hits one token",
        null="≈ std⁴ d_k²/2 for independent entries",
        source="entropy (2402.02098)",
        per_head=True,
        cost="O(d d_k² + d_k³)",
        invariances=_NO_SCALE,
    ),
    _weight(
        "value_output_sign",
        "Mean sign of the real parts of the non-zero eigenvalues of W_O W_V, what a head (or, without head, all heads "
        "with equal weights) writes of a token it attends to: positive ones smooth, negative ones keep tokens apart.",
        range=(-1.0, 1.0),
        healthy="near 0 or below",
        collapsed="1: every direction is smoothed",
        null="0 ± 1/√d_k",
        source="oversmoothing_fixes (Dovonon et al.)",
        per_head=True,
        cost="O(d d_k² + d_k³); O(d³) for all heads",
    ),
)
