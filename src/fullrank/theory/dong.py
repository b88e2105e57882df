r"""Dong et al. (arXiv 2103.03404): pure attention loses rank at a cubic rate; skips add short paths.

**Assumes**, for the rate and the bound: stacked self-attention $X^+ = \sum_h A_h X W_h$, no skip, no MLP and no norm.
The count of paths assumes one skip past every attention layer and heads that are chosen alike.

**Symbols.** $L$ `depth`, $H$ `heads`, $d_{qk}$ `head_width`, $k$ `length` of a path (attention layers on it), and for
the bound $\beta \ge \|W_{QK}\|_1 \|W_h\|_{1,\infty}$, induced norms, $\|M\|_{1,\infty} = \sqrt{\|M\|_1\|M\|_\infty}$;
the residual $r = \|X - \mathbf 1 x^\top\|_{1,\infty}$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Bound",
    "composite_norm",
    "cubic_decrements",
    "mean_path_length",
    "path_length_probability",
    "path_lengths",
    "residual_bound",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ paths


def path_length_probability(length: ArrayLike, *, depth: ArrayLike, heads: ArrayLike) -> Array:
    r"""Share of the paths through a stack with skips that pass `length` attention layers.

    Of $(H+1)^L$ paths $\binom Lk H^k$ have length $k$: the number of layers passed is binomial with probability
    $H/(H+1)$.

    Args:
        length: k, from 0 to L.
        depth: L.
        heads: H.

    Returns:
        P(k), of the broadcast shape.
    """
    from scipy.special import gammaln, xlogy

    k, count, own = (np.asarray(one, float) for one in (length, depth, heads))
    inside = (k >= 0) & (k <= count)
    k = np.where(inside, k, 0.0)
    binomial = gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1)
    return np.asarray(np.where(inside, np.exp(binomial + xlogy(k, own) - count * np.log1p(own)), 0.0))


def path_lengths(*, depth: int, heads: int) -> Array:
    """P(k) for k = 0 … depth, of shape (depth + 1,), adding to 1."""
    return path_length_probability(np.arange(depth + 1), depth=depth, heads=heads)


def mean_path_length(*, depth: ArrayLike, heads: ArrayLike) -> Array:
    r"""$L\,H/(H+1)$: of the paths counted alike, most are long; what they carry is another matter."""
    own = np.asarray(heads, float)
    return np.asarray(np.asarray(depth, float) * own / (own + 1))


# ------------------------------------------------------------ the rate


def cubic_decrements(first: float, *, layers: int) -> Array:
    r"""Falls of $\log r$ from layer to layer under the cubic law $r_{l+1} \propto r_l^3$: δ, 3δ, 9δ, and so on.

    The constant of the law cancels in the ratio of successive falls, which is what can be measured.

    Args:
        first: δ, the first fall of log r (positive).
        layers: how many falls.

    Returns:
        Of shape (layers,).
    """
    return np.asarray(first * 3.0 ** np.arange(layers))


# ------------------------------------------------------------ the bound


@dataclass(frozen=True)
class Bound:
    """What the theorem says of a stack.

    Attributes:
        log_residual: natural logarithm of the upper bound on the residual after the last layer; may be infinite.
        factor: 4βH r²/√d_qk of the first layer: the bound shrinks from layer to layer only where this is below 1.
        says: one sentence; where the bound is vacuous it says so.
    """

    log_residual: float
    factor: float
    says: str

    @property
    def vacuous(self) -> bool:
        """Whether the bound is above the residual that the stack began with."""
        return self.factor >= 1


def residual_bound(residual: float, *, beta: float, heads: int, head_width: int, depth: int) -> Bound:
    r"""The theorem's bound on what is left of the residual of a pure attention stack.

    $r_L \le c^{(3^L-1)/2}\,r_0^{3^L}$ with $r = \|\mathrm{res}(X)\|_{1,\infty}$ and $c = 4\beta H/\sqrt{d_{qk}}$. It
    contracts only where $c\,r_0^2 < 1$, which no ordinary initialisation meets: there the cubic rate is seen all the
    same, and the bound says nothing of it.

    Args:
        residual: ‖res(X₀)‖₁,∞, at least 0.
        beta: β.
        heads: H.
        head_width: d_qk.
        depth: L.

    Returns:
        The bound, its condition and a sentence.
    """
    if residual == 0:
        return Bound(-math.inf, 0.0, "The tokens are equal from the start.")
    constant = 4 * beta * heads / math.sqrt(head_width)
    factor = constant * residual**2
    # c^((3^L − 1)/2) r^(3^L) = r · (c r²)^((3^L − 1)/2), which shows the condition
    power = (3.0**depth - 1) / 2
    log_residual = math.log(residual) + (power * math.log(factor) if factor > 0 else -math.inf)
    if factor >= 1:
        says = (
            f"The bound is vacuous: 4βH r²/√d_qk is {factor:.3g}, and it contracts only below 1; what falls here falls "
            f"at a rate that the theorem does not bound."
        )
    else:
        says = f"After {depth} layers the residual is at most exp({log_residual:.3g}) (4βH r²/√d_qk = {factor:.3g})."
    return Bound(log_residual, factor, says)


def composite_norm(matrix: ArrayLike) -> Array:
    r"""$\|M\|_{1,\infty} = \sqrt{\|M\|_1\,\|M\|_\infty}$ of the last two axes: largest column sum times row sum.

    Args:
        matrix: of shape (…, rows, columns); float64, or values near the floor are lost.

    Returns:
        Of shape (…).
    """
    size = np.abs(np.asarray(matrix, float))
    return np.asarray(np.sqrt(size.sum(-2).max(-1) * size.sum(-1).max(-1)))
