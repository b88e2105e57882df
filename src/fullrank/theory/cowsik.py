r"""Cowsik et al. (arXiv 2403.02579): two exponents at initialisation, of the angle between tokens and of gradients.

**Assumes** nearly equal tokens (ρ near 1), where attention is uniform; a wide stream and wide hidden layers; weights
that are independent of each other. The angle exponent $\lambda_a$ is the logarithm of what a block multiplies
$1 - \rho$ by: below 0 tokens merge, above 0 they part. The gradient exponent is
$\lambda_g = \tfrac1L\log\|\partial\langle R, X_L\rangle/\partial X_0\|_F^2$ for a random R of norm 1. A network trains
where both are near 0. The formulas are derived here (see `cowsik_block`), for the paper's are not at hand.

**Symbols.** Of the paper's block,
$X + \alpha_A\,\mathrm{Attn}(\mathrm{LN}X)$, then $X + \alpha_M\,\mathrm{MLP}(\mathrm{LN}X)$
with one hidden layer of φ as wide as the stream: $\alpha_A$ `attention_branch`, $\alpha_M$ `mlp_branch`, $\sigma_w$
`weight_std` (the MLP's weights have entries of variance $\sigma_w^2/d$), $\sigma_v^2$ `value_gain`, $s_A, s_M$
`attention_skip`, `mlp_skip` (1, or `balanced_skip`), q `size`, the mean square of the stream's entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.activations import overlap
from fullrank.theory.assumption import Assumption
from fullrank.theory.courses import stream_rows
from fullrank.theory.cowsik_block import Step
from fullrank.theory.cowsik_course import State, course
from fullrank.theory.giorlandino_goldt_parameters import Parameters, parameters_of
from fullrank.theory.mean_field import KNOWN_MOMENTS, MANY_TOKENS, NORM_PER_TOKEN, WIDE_HEADS, WIDE_STREAM
from fullrank.theory.slopes import mean_square_slope
from fullrank.theory.theory import theory

__all__ = [
    "COWSIK",
    "Exponents",
    "angle_exponent",
    "balanced_skip",
    "exponents",
    "gradient_exponent",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ the paper's block


def balanced_skip(branch: ArrayLike) -> Array:
    r"""$\sqrt{1-\alpha^2}$, the skip that keeps the size of the stream where the branch keeps it; α in [−1, 1]."""
    return np.asarray(np.sqrt(1 - np.square(np.asarray(branch, float))))


def angle_exponent(
    attention_branch: ArrayLike,
    mlp_branch: ArrayLike,
    *,
    weight_std: ArrayLike,
    value_gain: ArrayLike = 1.0,
    activation: str = "tanh",
    attention_skip: ArrayLike = 1.0,
    mlp_skip: ArrayLike = 1.0,
    size: ArrayLike = 1.0,
) -> Array:
    r"""$\lambda_a = \log\frac{q\,s_A^2(s_M^2 + \alpha_M^2\chi/q_1)}{s_M^2q_1 + \alpha_M^2v}$ of one block, near ρ = 1.

    $q_1 = s_A^2q + \alpha_A^2\sigma_v^2$, $\chi = \sigma_w^4\mathbb E[\varphi'(\sigma_wz)^2]$,
    $v = \sigma_w^2\mathbb E[\varphi(\sigma_wz)^2]$. Local: not how fast a spread cloud comes near
    to collapse. Attention is uniform: entropy collapse cannot be seen.

    Args:
        attention_branch: α_A.
        mlp_branch: α_M.
        weight_std: σ_w.
        value_gain: σ_v².
        activation: φ.
        attention_skip: s_A.
        mlp_skip: s_M.
        size: q.

    Returns:
        λ_a, of the broadcast shape: an array of α against one of σ_w is a contour map. −∞ where no skip is left.
    """
    made = _paper(
        attention_branch, mlp_branch, weight_std, value_gain, activation, attention_skip, mlp_skip, np.asarray(size)
    )
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(made.particular) + np.log(size) - np.log(made.size))


def gradient_exponent(
    attention_branch: ArrayLike,
    mlp_branch: ArrayLike,
    *,
    depth: int,
    tokens: ArrayLike,
    weight_std: ArrayLike,
    value_gain: ArrayLike = 1.0,
    activation: str = "tanh",
    attention_skip: ArrayLike = 1.0,
    mlp_skip: ArrayLike = 1.0,
    size: ArrayLike = 1.0,
) -> Array:
    r"""$\lambda_g = \tfrac1L\log[(1-\tfrac1T)\prod_\ell P_\ell + \tfrac1T\prod_\ell C_\ell]$ near ρ = 1.

    $P = s_A^2(s_M^2 + \alpha_M^2\chi/q_1)$ multiplies gradients that cancel over tokens, all but 1/T of a random R;
    $C = (s_A^2 + \alpha_A^2\sigma_v^2/q)(s_M^2 + \alpha_M^2\chi/q_1)$ those that tokens share. q follows the stream:
    $q \leftarrow s_M^2q_1 + \alpha_M^2v$ block by block; without `balanced_skip` it grows, and the
    factors approach 1.

    Args:
        attention_branch: α_A.
        mlp_branch: α_M.
        depth: L ≥ 1.
        tokens: T; every token sees all.
        weight_std: σ_w.
        value_gain: σ_v².
        activation: φ.
        attention_skip: s_A.
        mlp_skip: s_M.
        size: q before the first block.

    Returns:
        λ_g, of the broadcast shape.
    """
    q, particular, common = np.asarray(size, float), np.asarray(0.0), np.asarray(0.0)
    with np.errstate(divide="ignore"):
        for _ in range(depth):
            made = _paper(attention_branch, mlp_branch, weight_std, value_gain, activation, attention_skip, mlp_skip, q)
            q = made.size
            particular, common = particular + np.log(made.particular), common + np.log(made.common)
        share = 1 / np.asarray(tokens, float)
        return np.asarray(np.logaddexp(particular + np.log1p(-share), common + np.log(share)) / depth)


def _paper(
    attention_branch: ArrayLike,
    mlp_branch: ArrayLike,
    weight_std: ArrayLike,
    value_gain: ArrayLike,
    activation: str,
    attention_skip: ArrayLike,
    mlp_skip: ArrayLike,
    q: Array,
) -> Step:
    """One pre-norm block, written out."""
    square = [np.square(np.asarray(one, float)) for one in (attention_branch, mlp_branch, attention_skip, mlp_skip)]
    a, m, skip_a, skip_m = square
    s2, gain = np.square(np.asarray(weight_std, float)), np.asarray(value_gain, float)
    v = s2 * overlap(activation, s2, s2, s2)
    chi = s2 * s2 * mean_square_slope(activation, s2)
    q1 = skip_a * q + a * gain
    mlp = skip_m + m * chi / q1
    return Step(skip_m * q1 + m * v, skip_a * mlp, (skip_a + a * gain / q) * mlp)


# ------------------------------------------------------------ of an architecture


@dataclass(frozen=True)
class Exponents:
    """Means over the blocks of an architecture.

    Attributes:
        angle: λ_a, the mean over blocks: (1/L) log((1 − ρ_L)/(1 − ρ_0)) as ρ → 1.
        gradient: λ_g over all tokens.
        gradient_late: λ_g over the later half of the tokens, which under a causal mask few tokens send gradients to;
            as `gradient` elsewhere.
    """

    angle: Array
    gradient: Array
    gradient_late: Array


def exponents(architecture: Architecture, **fields: Any) -> Exponents:
    """Both exponents of any norm and placement, gated or parallel, with biases, from its standard deviations.

    Args:
        architecture: of which; its correlation is taken to be near 1.
        **fields: arrays in place of numeric fields, by name or shorthand; they broadcast: a contour map.

    Returns:
        λ_a and λ_g, of the shape that the fields broadcast to.
    """
    one = parameters_of(architecture, **fields)
    for state in course(one):  # noqa: B007 - the last one is wanted
        pass
    return _exponents(one, state)


def _exponents(one: Parameters, state: State) -> Exponents:
    L = one.depth
    angle = state.apart(one) - state.growth
    return Exponents(
        np.asarray(angle / L),
        np.asarray(state.gradient(one) / L),
        np.asarray(state.gradient(one, late=True) / L),
    )


def _near(architecture: Architecture) -> float:
    """Errors of both exponents grow with 1 − ρ₀."""
    return max(0.0, architecture.correlation) ** 4


def _mask(architecture: Architecture) -> float:
    """Under a causal mask the averages that tokens are given differ, the more the earlier they are."""
    return 1.0 if architecture.mask == "full" else 0.9


_ASSUMES = (
    Assumption("tokens are nearly equal", _near, "its tokens begin at a mean cosine of {correlation:.2g}, not near 1"),
    KNOWN_MOMENTS,
    NORM_PER_TOKEN,
    Assumption(
        "pre-norm, as in the paper's block",
        lambda one: {"pre": 1.0, "none": 0.7}.get(one.placement, 0.9),
        "its norms stand {placement}",
    ),
    Assumption("every token sees all", _mask, "its mask is {mask}"),
    Assumption(
        "no window",
        lambda one: 1.0 if one.window is None or one.window >= one.context else 0.0,
        "its queries see a window of {window} tokens",
    ),
    Assumption(
        "attention is uniform where tokens are equal",
        lambda one: {"alibi": 0.5, "relative": 0.7}.get(one.positions, 1.0),
        "its positions are {positions}",
    ),
    WIDE_STREAM,
    WIDE_HEADS,
    MANY_TOKENS,  # the last three as of the map that it linearises: it is never the better of the two
)


@theory(
    "cowsik",
    title="angle and gradient exponents at initialisation (arXiv 2403.02579)",
    assumes=_ASSUMES,
    gives=("similarity", "residual", "rms", "angle_exponent", "gradient_exponent"),
)
def COWSIK(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows of both exponents, at the last layer as `examine` gives them, and of the stream that λ_a makes.

    `gradient_exponent` is for gradients that are independent between the tokens of the last state: a random
    projection, or the loss of a language model that has learnt nothing.

    Args:
        architecture: of which.

    Returns:
        Rows of the stream, layer by layer, and of the exponents.
    """
    one = parameters_of(architecture)
    late = architecture.mask == "causal"
    sizes, lost = [], []
    for state in course(one):
        sizes.append(float(state.size))
        lost.append(float(state.apart(one, late=late) - state.growth))
    apart = (1 - architecture.correlation) * np.exp(np.minimum(lost, 99.0))  # beyond 1 in any case
    rows = stream_rows("cowsik", architecture, 1 - np.minimum(apart, 1.0), mean_square=np.array(sizes))
    found = _exponents(one, state)
    numbers = [("angle_exponent", "all", found.angle), ("gradient_exponent", "all", found.gradient)]
    if late:
        numbers.append(("gradient_exponent", "late", found.gradient_late))
    return rows + [
        Row(
            architecture.stack,
            architecture.depth,
            "gradient",
            "out",
            metric,
            float(value),
            scope=scope,
            n=None,
            exact=False,
            source="theory:cowsik",
        )
        for metric, scope, value in numbers
        if np.isfinite(value)
    ]
