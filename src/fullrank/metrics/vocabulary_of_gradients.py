"""The vocabulary of gradients: what a backward brings to states, heads and parameters."""

import math
from typing import Final

from fullrank.metrics.definition import Definition, Invariance

__all__ = ["GRADIENTS"]

_ALL: Final = frozenset[Invariance]({"token_permutation", "rotation", "scale"})
_NO_SCALE: Final = frozenset[Invariance]({"token_permutation", "rotation"})


def _gradient(
    name: str,
    definition: str,
    *,
    healthy: str,
    collapsed: str,
    null: str,
    source: str,
    unit: str = "1",
    range: tuple[float, float] = (0.0, math.inf),  # noqa: A002 - the name of the field
    cost: str = "one backward",
    invariances: frozenset[Invariance] = _ALL,
) -> Definition:
    return Definition(
        name, definition, unit, range, healthy, collapsed, null, source, "gradient", False, cost, invariances
    )


GRADIENTS: Final = (
    _gradient(
        "gradient_rms",
        "Root mean square of the gradient's entries over real tokens, √(Σ g² / (T d)): of a stream state, or of a "
        "head's queries, keys, values or output. Of the model's own loss times the number of sequences, or of random "
        "projections of the last state; its absolute size means something only where the scale of the loss is known.",
        unit="loss per state",
        healthy="of one order over depth",
        collapsed="0 (vanished) or ∞ (exploded)",
        null="1 at the last state, for projections",
        source="noci (2206.03126)",
        invariances=_NO_SCALE,
    ),
    _gradient(
        "gradient_gain",
        "How much larger the gradient is than at the last layer, ‖∂/∂X_ℓ‖_F / ‖∂/∂X_L‖_F over the tokens of the "
        "scope. A loss scale drops out.",
        healthy="of order 1 at every layer",
        collapsed="0 (the first layers get nothing) or ∞ (exploded)",
        null="1 for blocks that rotate their states",
        source="residual_scaling (first-to-last ratio)",
    ),
    _gradient(
        "gradient_norm",
        "Frobenius norm of a parameter's gradient, ‖∂W‖_F: of the mean loss over sequences, or, for random "
        "projections, the root of the mean over sequences and probes of its square.",
        unit="loss per weight",
        healthy="above 0 in every tensor",
        collapsed="0: the tensor learns nothing",
        null="0 for a tensor that is not used",
        source="gradient_heterogeneity (2502.00213)",
        invariances=_NO_SCALE,
    ),
    _gradient(
        "elasticity",
        "How much the loss can change with a relative change of a weight, ‖W‖_F ‖∂W‖_F, by the weight's role. It "
        "stays the same where one weight is multiplied by c and the next divided by c.",
        unit="that of the loss",
        healthy="of one order over roles and depth",
        collapsed="0: the role has no say in the loss",
        null="0 for a weight that is not used",
        source="noci (2206.03126) on gradients by role; Cauchy and Schwarz",
        invariances=_NO_SCALE,
    ),
    _gradient(
        "elasticity_ratio",
        "Elasticity of queries and keys over that of values and output in an attention call, √(e_q² + e_k²) / "
        "√(e_v² + e_o²). A loss scale drops out.",
        healthy="not far below 1",
        collapsed="0: attention no longer depends on queries and keys",
        null="0 where all tokens are one",
        source="noci (2206.03126)",
    ),
    _gradient(
        "query_key_to_value_output",
        "Root mean square of the gradients of W_Q and W_K over that of W_V and W_O, all entries pooled. A loss scale "
        "drops out; unlike elasticity_ratio it depends on how large the weights were drawn.",
        healthy="default initialisations give .02 to .2, and train",
        collapsed="0: attention no longer depends on queries and keys",
        null="0 where all tokens are one",
        source="noci (2206.03126); gradient_heterogeneity (2502.00213)",
    ),
    _gradient(
        "gradient_heterogeneity",
        "Gini coefficient of ‖∂W_b‖_F/√P_b over the parameter tensors b of a stack that a gradient reaches: how "
        "unevenly they learn.",
        range=(0.0, 1.0),
        healthy="low; near .5 in transformers at initialisation",
        collapsed="1: one tensor has all of the gradient",
        null="0 where all are alike",
        source="gradient_heterogeneity (2502.00213)",
    ),
    _gradient(
        "angle_exponent",
        "λ_a over the depth at hand, (1/L) log((1 − ρ_L)/(1 − ρ_0)) with ρ the similarity of the first and the last "
        "state. The exponent of the theory is local, at nearly equal tokens; far from there this is the mean rate at "
        "which the tokens approach each other or part.",
        range=(-math.inf, math.inf),
        healthy="near 0",
        collapsed="negative: tokens merge (ordered); positive: they part (chaotic)",
        null="0",
        source="cowsik (2403.02579)",
        cost="O(T d)",
    ),
    _gradient(
        "gradient_exponent",
        "λ_g over the depth at hand, (1/L) log(‖∂/∂X_0‖² / ‖∂/∂X_L‖²): the rate at which gradients grow backwards. A "
        "loss scale drops out.",
        range=(-math.inf, math.inf),
        healthy="near 0",
        collapsed="negative: they vanish; positive: they explode",
        null="0",
        source="cowsik (2403.02579)",
    ),
)
