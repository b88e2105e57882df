r"""Noci et al. (arXiv 2206.03126): norm and correlation over depth where attention is uniform and the MLP is linear.

**Assumes** a block $Z = X + \alpha_1 J X W_V$, $X^+ = Z + \alpha_2 Z W_1 W_2$ with uniform attention $J$, independent
weights of mean 0 that preserve variance (entries of variance 1/d), no norm, a linear MLP, every token sees all tokens.
Logits of variance $s^2$ are admitted by a finite-logit correction of the norm.

**Symbols.** $T$ `tokens`, $d$ `width`, $L$ `depth`, $\alpha_1$ `attention_branch`, $\alpha_2$ `mlp_branch`, $\rho_0$
`correlation`, the mean cosine between different tokens. $N = \mathbb E\|X\|_F^2$, $C = \mathbb E\|\sum_t x_t\|^2$, so
that for tokens of one norm $C/N = 1 + (T-1)\rho$.

Every function broadcasts over arrays of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption
from fullrank.theory.courses import stream_rows
from fullrank.theory.noci_size import effective_branch, stream_square
from fullrank.theory.theory import theory

__all__ = [
    "NOCI",
    "balancing_temperature",
    "correlation",
    "correlation_limit",
    "growth",
    "growth_limit",
    "layers_until",
    "query_gradient",
    "value_gradient",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ forward


def correlation(
    depth: ArrayLike, *, tokens: ArrayLike, attention_branch: ArrayLike, correlation: ArrayLike = 0.0
) -> Array:
    r"""Mean cosine between tokens after `depth` blocks.

    $\rho_L = (C_L/N_L - 1)/(T - 1)$ with $C_L/N_L = c_0 (1+\alpha_1^2)^L / (1 + \tfrac{c_0}{T}((1+\alpha_1^2)^L - 1))$
    and $c_0 = 1 + (T-1)\rho_0$. $\alpha_2$ cancels. For large $T$ the odds $\rho/(1-\rho)$ grow by $1 + \alpha_1^2$ a
    block.

    Args:
        depth: blocks, L ≥ 0.
        tokens: T ≥ 2.
        attention_branch: α₁.
        correlation: ρ₀ in [−1/(T−1), 1].

    Returns:
        ρ_L, in the same range.
    """
    growth = np.asarray(depth, float) * np.log1p(np.square(np.asarray(attention_branch, float)))
    return _correlation(growth, tokens=tokens, correlation=correlation)


def correlation_limit(*, tokens: ArrayLike, strength: ArrayLike, correlation: ArrayLike = 0.0) -> Array:
    r"""Mean cosine at infinite depth where branches shrink as $\alpha_1 = \tilde\alpha_1/\sqrt L$.

    The same with $(1+\alpha_1^2)^L \to e^{\tilde\alpha_1^2}$: below 1, so that tokens stay apart at any depth.

    Args:
        tokens: T ≥ 2.
        strength: α̃₁.
        correlation: ρ₀.

    Returns:
        ρ_∞.
    """
    return _correlation(np.square(np.asarray(strength, float)), tokens=tokens, correlation=correlation)


def _correlation(growth: Any, *, tokens: ArrayLike, correlation: ArrayLike) -> Array:
    """From the logarithm of (1 + α₁²)^L; written in e^(−growth), which does not overflow."""
    count, rho = np.asarray(tokens, float), np.asarray(correlation, float)
    start = 1 + (count - 1) * rho
    shrunk = np.exp(-growth)
    together = start / (shrunk + start / count * (1 - shrunk))
    return np.asarray((together - 1) / (count - 1))


def growth(
    depth: ArrayLike,
    *,
    tokens: ArrayLike,
    attention_branch: ArrayLike,
    mlp_branch: ArrayLike = 0.0,
    correlation: ArrayLike = 0.0,
) -> Array:
    r"""Squared size of the stream after `depth` blocks over that before the first.

    $N_L/N_0 = (1+\alpha_2^2)^L\,[1 + \tfrac{c_0}{T}((1+\alpha_1^2)^L - 1)]$.

    Args:
        depth: blocks, L.
        tokens: T.
        attention_branch: α₁.
        mlp_branch: α₂; 0 for no MLP.
        correlation: ρ₀.

    Returns:
        N_L / N_0, 1 or more.
    """
    return _growth(
        np.asarray(depth, float) * np.log1p(np.square(np.asarray(attention_branch, float))),
        np.asarray(depth, float) * np.log1p(np.square(np.asarray(mlp_branch, float))),
        tokens=tokens,
        correlation=correlation,
    )


def growth_limit(
    *, tokens: ArrayLike, strength: ArrayLike, mlp_strength: ArrayLike = 0.0, correlation: ArrayLike = 0.0
) -> Array:
    r"""The same at infinite depth with branches $\tilde\alpha_i/\sqrt L$: $e^{\tilde\alpha_2^2}[1+\tfrac{c_0}T(e^{\tilde\alpha_1^2}-1)]$.

    Args:
        tokens: T.
        strength: α̃₁.
        mlp_strength: α̃₂.
        correlation: ρ₀.

    Returns:
        N_∞ / N_0.
    """  # noqa: E501 - a formula in one piece
    of_attention, of_mlp = np.square(np.asarray(strength, float)), np.square(np.asarray(mlp_strength, float))
    return _growth(of_attention, of_mlp, tokens=tokens, correlation=correlation)


def _growth(of_attention: Any, of_mlp: Any, *, tokens: ArrayLike, correlation: ArrayLike) -> Array:
    count = np.asarray(tokens, float)
    start = 1 + (count - 1) * np.asarray(correlation, float)
    return np.asarray(np.exp(of_mlp) * (1 + start / count * np.expm1(of_attention)))


def layers_until(limit: ArrayLike, *, tokens: ArrayLike, attention_branch: ArrayLike, correlation: ArrayLike) -> Array:
    r"""Blocks until the mean cosine reaches `limit`: $\log(\text{ratio})/\log(1+\alpha_1^2)$, from the closed form.

    Args:
        limit: ρ to reach, below 1.
        tokens: T.
        attention_branch: α₁.
        correlation: ρ₀ above −1/(T−1).

    Returns:
        Blocks, not rounded; 0 where it is reached from the start, infinite for α₁ = 0.
    """
    count = np.asarray(tokens, float)
    start, there = (1 + (count - 1) * np.asarray(rho, float) for rho in (correlation, limit))
    # c = c₀ g / (1 + c₀ (g − 1)/T), solved for g
    factor = there * (count - start) / (start * (count - there))
    with np.errstate(divide="ignore"):
        blocks = np.log(factor) / np.log1p(np.square(np.asarray(attention_branch, float)))
    return np.asarray(np.maximum(0.0, blocks))


# ------------------------------------------------------------ gradients of one attention layer


def value_gradient(*, tokens: ArrayLike, width: ArrayLike, correlation: ArrayLike) -> Array:
    r"""$\mathbb E\|\partial S/\partial W_V\|_F^2 = d^2\,[1 + (T-1)\rho]$, of $S = J X W_V$ with $\|x_t\|^2 = d$.

    Args:
        tokens: T.
        width: d.
        correlation: ρ of the layer's input.

    Returns:
        Squared Frobenius norm of the Jacobian.
    """
    count, rho = np.asarray(tokens, float), np.asarray(correlation, float)
    return np.asarray(np.square(np.asarray(width, float)) * (1 + (count - 1) * rho))


def query_gradient(
    *, tokens: ArrayLike, width: ArrayLike, correlation: ArrayLike, temperature: ArrayLike = 1.0
) -> Array:
    r"""$\mathbb E\|\partial S/\partial W_Q\|_F^2 = \tau^2 d\,(T+d)\,(1-\rho)^2$, and the same for $W_K$.

    At uniform attention, weights of variance 1/d, $\|x_t\|^2 = d$, logits multiplied by $\tau/\sqrt{d_k}$. It vanishes
    as tokens become alike, while that of the values grows.

    Args:
        tokens: T.
        width: d.
        correlation: ρ of the layer's input.
        temperature: τ, the inverse temperature.

    Returns:
        Squared Frobenius norm of the Jacobian.
    """
    count, d = np.asarray(tokens, float), np.asarray(width, float)
    apart = np.square(1 - np.asarray(correlation, float))
    return np.asarray(np.square(np.asarray(temperature, float)) * d * (count + d) * apart)


def balancing_temperature(*, tokens: ArrayLike, width: ArrayLike, correlation: ArrayLike) -> Array:
    r"""$\tau_* = \sqrt{d\,[1+(T-1)\rho] / ((T+d)(1-\rho)^2)}$, at which queries and values get gradients of one size.

    Args:
        tokens: T.
        width: d.
        correlation: ρ below 1.

    Returns:
        τ_*; infinite at ρ = 1.
    """
    at_one = query_gradient(tokens=tokens, width=width, correlation=correlation)
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt(value_gradient(tokens=tokens, width=width, correlation=correlation) / at_one))


# ------------------------------------------------------------ of an architecture

_UNIFORM = 0.5


def _skips_stay(architecture: Architecture) -> float:
    return float(architecture.attention_skip != 0 and architecture.mlp_skip != 0)


def _no_norm(architecture: Architecture) -> float:
    """A pre-norm brings the branch's input to rms 1 whatever the stream's size: the recursion lets it grow along."""
    if architecture.norm == "batchnorm":  # taken over tokens: it takes out what they have in common
        return 0.0
    return {"none": 1.0, "pre": 0.3, "peri": 0.2, "res-post": 0.2, "post": 0.5}[architecture.placement]


def _linear(architecture: Architecture) -> float:
    """A nonlinear MLP draws tokens together as well; the recursion has none of that."""
    return 1.0 if architecture.mlp_width == 0 or architecture.activation == "identity" else 0.3


def _uniform(architecture: Architecture) -> float:
    """Logits of spread s change the mean of the values by O(s²/T) and its size by e^{s²}."""
    return math.exp(-0.5 * (architecture.logit_std / _UNIFORM) ** 2) if architecture.logit_std < 3 else 0.0


@theory(
    "noci",
    title="residual branches and rank collapse (arXiv 2206.03126)",
    assumes=(
        Assumption("there is a skip past each branch", _skips_stay, "it has a branch without a skip"),
        Assumption("attention is uniform", _uniform, "its logits are far from equal at initialisation"),
        Assumption("there is no norm", _no_norm, "its norms are {norm}, {placement}"),
        Assumption("the MLP is linear", _linear, "its MLP has {activation} units"),
        Assumption(
            "every token sees all tokens",
            lambda one: float(one.window is None) * (1.0 if one.mask == "full" else 0.5),
            "its queries see a window of {window} tokens",
        ),
    ),
    gives=("similarity", "residual", "rms"),
)
def NOCI(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows of the closed form, with the branch's strength as the weights make it; `rms` where nothing else enters."""
    depth = np.arange(architecture.depth + 1)
    branch = effective_branch(architecture)
    rho = correlation(depth, tokens=architecture.context, attention_branch=branch, correlation=architecture.correlation)
    error = np.zeros_like(rho)
    if architecture.correlation_stderr:
        ends = [
            correlation(depth, tokens=architecture.context, attention_branch=branch, correlation=at)
            for at in (
                max(architecture.correlation - architecture.correlation_stderr, -1 / (architecture.context - 1)),
                min(architecture.correlation + architecture.correlation_stderr, 1.0),
            )
        ]
        error = np.abs(ends[1] - ends[0]) / 2
    return stream_rows("noci", architecture, rho, error=error, mean_square=stream_square(architecture))
