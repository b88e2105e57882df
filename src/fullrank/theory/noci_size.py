r"""Noci et al. (arXiv 2206.03126): what an architecture's weights make of α₁, and the size of its stream over layers.

The closed form is of weights that preserve variance, skips of 1 and a stream of rms 1. Here $\alpha_1$ is
$\tfrac{b_a}{s_a}\sqrt{g_a}/r$, $g_a$ the value gain and $r$ the stream's own rms where the branch reads a normed one;
the MLP's square is $b_m^2g_m/s_m^2$ with $g_m = (d\,\sigma_{up}^2)(d_{mlp}\,\sigma_{down}^2)$, and skips multiply the
stream by $s_a^2s_m^2$ a block. Symbols as in `noci`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.theory.giorlandino_goldt_map import UNBOUNDED

__all__ = ["effective_branch", "stream_square"]

Array = NDArray[np.float64]


def effective_branch(architecture: Architecture) -> float:
    """α₁ with what weights that do not preserve variance, skips, and a stream that is not of rms 1, make of it.

    Args:
        architecture: with a skip past attention.

    Returns:
        The strength, 0 or more where branch and skip are.
    """
    one = architecture
    read = 1 / one.input_rms if one.placement in ("pre", "peri") else 1.0  # of rms 1, added to the stream's own
    return one.attention_branch / one.attention_skip * math.sqrt(one.value_gain) * read


def stream_square(architecture: Architecture) -> Array | None:
    r"""Mean square of the stream's entries before the first block and after every block, $r^2 N_\ell/N_0$.

    Args:
        architecture: with skips past both branches.

    Returns:
        Of shape (depth + 1,), infinite where it is beyond 1e60; None where not the recursion alone decides it: with
        a norm, units that are not linear, biases or parallel branches.
    """
    one, layers = architecture, np.arange(architecture.depth + 1)
    no_mlp = not one.mlp_width or not one.mlp_branch
    linear = no_mlp or (one.activation == "identity" and not one.gated)
    biased = one.std_bias_attention or one.std_bias_mlp or one.std_bias_up
    if one.placement != "none" or one.parallel or not linear or biased:
        return None
    gain = one.width * one.std_up**2 * float(one.mlp_width or 0) * one.std_down**2
    of_attention = math.log1p(effective_branch(one) ** 2)
    of_mlp = math.log(one.attention_skip**2)
    if one.mlp_width:
        of_mlp += math.log(one.mlp_skip**2 + one.mlp_branch**2 * gain)
    grown = 2 * math.log(one.input_rms) + _log_growth(one, layers * of_attention, layers * of_mlp)
    most = math.log(UNBOUNDED)
    return np.where(grown < most, np.exp(np.minimum(grown, most)), np.inf)


def _log_growth(architecture: Architecture, of_attention: Any, of_mlp: Any) -> Array:
    """Logarithm of N_L/N_0 from those of (1 + α₁²)^L and (1 + α₂²)^L: nothing overflows."""
    count, rho = architecture.context, architecture.correlation
    together, apart = max(0.0, 1 + (count - 1) * rho) / count, (count - 1) * (1 - rho) / count
    with np.errstate(divide="ignore"):  # either is 0 at an end of what ρ can be
        return np.asarray(of_mlp + np.logaddexp(np.log(apart), np.log(together) + of_attention))
