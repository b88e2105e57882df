r"""Mind the Gap (arXiv 2410.07799): attention as a random Markov matrix, one outlier above a bulk of size 1/√T.

**Assumes** $A_{ts} = D_{ts}/\sum_rD_{tr}$ with independent $D \ge 0$: rows and entries know nothing of each other, of
the tokens or of the values, and every query sees every key. Spectra are in `mind_the_gap_spectra`, causal maps in
`mind_the_gap_causal`; of keys and queries of few channels, whose logits are not independent, `key_query_bulk` speaks.

**Symbols.** $T$ `tokens`, $d$ `width`, $\gamma = T/d$ `ratio`, $\ell$ `layers`, $\sigma$ `deviation`, standard
deviation over mean of the entries, $s$ `logit_std`, of the logits within a row, $Y_2 = \mathbb E\sum_sA_{ts}^2$,
$\rho$ `correlation`, mean cosine between tokens, $J = \tfrac1T\mathbf 1\mathbf 1^\top$,
$\mathrm{sr}(\Sigma) = \sum_is_i^4/s_1^4$ of the token matrix (`gram_stable_rank`, uncentred).

Sources: Bordenave, Caputo and Chafaï (arXiv 0808.1502) for eigenvalues, Chafaï (arXiv 0709.4678) for singular values.
Every function broadcasts over arrays of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption
from fullrank.theory.fuss_catalan import rectangular_rank_share
from fullrank.theory.giorlandino_goldt import giorlandino_goldt
from fullrank.theory.mind_the_gap_layers import GIVES, layer_rows
from fullrank.theory.theory import theory

__all__ = [
    "MIND_THE_GAP",
    "branch_energy",
    "contrast_gain",
    "gradient_exponent",
    "gradient_square",
    "mean_dominated_stable_rank",
    "stable_rank",
    "stable_rank_centred",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ what layers do to tokens


def stable_rank(layers: ArrayLike, *, tokens: ArrayLike, ratio: ArrayLike = 1.0, deviation: ArrayLike = 1.0) -> Array:
    r"""$\mathrm{sr}(\Sigma_\ell) \simeq 1 + (1+\ell+\ell\gamma)\,\sigma^{4\ell}\,T^{1-2\ell}$ after ℓ layers.

    Of attention-only layers $X_\ell = A_\ell X_{\ell-1}W_\ell$ with Gaussian W and $X_0X_0^\top = I$; no skip, no norm.
    Collapse in width: it is 1 for many tokens.

    Args:
        layers: ℓ ≥ 1.
        tokens: T, large against σ².
        ratio: γ = T/d.
        deviation: σ.

    Returns:
        The gram stable rank; for many tokens, 1.
    """
    count, ell = np.asarray(tokens, float), np.asarray(layers, float)
    constant = 1 + ell + ell * np.asarray(ratio, float)
    return np.asarray(1 + constant * count * np.power(np.asarray(deviation, float) ** 2 / count, 2 * ell))


def stable_rank_centred(layers: ArrayLike, *, tokens: ArrayLike, ratio: ArrayLike = 1.0) -> Array:
    r"""The same with $A_\ell - J$: T times a constant, $(n+1)n^{2n}/(n+1)^{2(n+1)}$ with n = 2ℓ at γ = 1.

    At other γ, `fuss_catalan.rectangular_rank_share` with ℓ factors of each kind. σ cancels. The limit is of many
    tokens at fixed ℓ: 150 tokens keep 3.5 instead of 2.5 at ℓ = 4, and 1.8 instead of 1.0 at ℓ = 10.

    Args:
        layers: ℓ ≥ 1.
        tokens: T.
        ratio: γ = T/d.

    Returns:
        The gram stable rank, in proportion to T.
    """
    return np.asarray(np.asarray(tokens, float) * rectangular_rank_share(layers, layers, ratio=ratio))


def mean_dominated_stable_rank(correlation: ArrayLike, *, tokens: ArrayLike, ratio: ArrayLike) -> Array:
    r"""$\mathrm{sr}(XX^\top) \simeq 1 + (1-\rho)^2(1+\gamma)/(\rho^2T)$ of any tokens with a common part.

    Why uncentred ranks are near 1 before any attention, too.

    Args:
        correlation: ρ, with ρT well above 1.
        tokens: T.
        ratio: γ = T/d.

    Returns:
        The gram stable rank.
    """
    rho = np.asarray(correlation, float)
    return np.asarray(1 + np.square((1 - rho) / rho) * (1 + np.asarray(ratio, float)) / np.asarray(tokens, float))


def branch_energy(participation: ArrayLike, *, tokens: ArrayLike, correlation: ArrayLike = 0.0) -> Array:
    r"""$\frac{\|(A-J)V\|_F^2}{\|AV\|_F^2} \simeq \frac{(1-\rho)(Y_2-1/T)}{\rho+(1-\rho)Y_2}$, what centring leaves.

    Args:
        participation: Y₂; $(1+\sigma^2)/T$ in the model.
        tokens: T.
        correlation: ρ of the values.

    Returns:
        In [0, 1].
    """
    Y2, rho = np.asarray(participation, float), np.asarray(correlation, float)
    return np.asarray((1 - rho) * (Y2 - 1 / np.asarray(tokens, float)) / (rho + (1 - rho) * Y2))


def contrast_gain(deviation: ArrayLike, *, tokens: ArrayLike, shared: ArrayLike = 0.0) -> Array:
    r"""$\sqrt{\sigma^2/T + c}$, by which differences between values come out of a layer whose mean passes whole.

    The width law: exponent −½ in T, until $c$, what values know of the keys, takes over: $c = s^2/d$ where W_K and W_V
    read the same d independent channels.

    Args:
        deviation: σ.
        tokens: T.
        shared: c.

    Returns:
        The gain, `contrast_gain` of the table.
    """
    variance = np.square(np.asarray(deviation, float))
    return np.asarray(np.sqrt(variance / np.asarray(tokens, float) + np.asarray(shared, float)))


# ------------------------------------------------------------ gradients


def gradient_square(
    depth: ArrayLike, *, tokens: ArrayLike, width: ArrayLike, deviation: ArrayLike = 1.0, centred: bool = False
) -> Array:
    r"""$\mathbb E\|\partial X_L/\partial W_1\|_F^2$ of attention-only layers, weights N(0, 1), $X_0X_0^\top = I$.

    $= \mathbb E\|A_L\cdots A_1\|_F^2\;d^L$. With $q = \sigma^2(T-1)/T^2$, by which a layer shrinks what is not the
    mean, the first factor is $1 + \tfrac{\sigma^2}T\tfrac{T-1}T\tfrac{1-q^{L-1}}{1-q} + \ldots$; with $A - J$ it is
    $\sigma^2\tfrac{T-1}Tq^{L-1}$. To leading order $d^L$ and $d^L\,T^{1-L}\sigma^{2L}$.

    Args:
        depth: L ≥ 1.
        tokens: T.
        width: d.
        deviation: σ.
        centred: with A − J in every layer.

    Returns:
        The squared norm.
    """
    count, layers = np.asarray(tokens, float), np.asarray(depth, float)
    noise = np.square(np.asarray(deviation, float)) / count
    rest = (count - 1) * np.power(noise * (1 - 1 / count), layers - 1)  # ‖(I − J)A_{L−1}⋯A_1‖²
    grown = np.power(np.asarray(width, float), layers)
    if centred:
        return np.asarray(grown * noise * rest)
    kept = noise * (1 - 1 / count)
    # of the mean: 1, and what each earlier layer's noise added to it
    added = noise / count * (count - 1) * (1 - np.power(kept, layers - 1)) / (1 - kept)
    return np.asarray(grown * (1 + added + noise * rest))


def gradient_exponent(depth: ArrayLike, *, centred: bool = False) -> Array:
    r"""Exponent in T of `gradient_square` at fixed T/d: L, and 1 with A − J, whatever the depth.

    Args:
        depth: L ≥ 1.
        centred: with A − J in every layer.

    Returns:
        The exponent.
    """
    layers = np.asarray(depth, float)
    return np.asarray(np.ones_like(layers) if centred else layers)


# ------------------------------------------------------------ of an architecture


def _small_logits(architecture: Architecture) -> float:
    """The closed forms end at a gauge of √2/2; beyond √2 single keys take all."""
    return math.exp(-2 * architecture.gauge**4) if architecture.gauge < math.sqrt(2) else 0.0


def _many_channels(architecture: Architecture) -> float:
    """Rows of logits are independent for d_h ≫ T; the edge is corrected for fewer, the law is not."""
    width = float(architecture.head_width or 1)
    return (0.5 * architecture.context + width) / (architecture.context + width)


@theory(
    "mind_the_gap",
    title="attention as a random Markov matrix (arXiv 2410.07799)",
    assumes=(
        Assumption(
            "logits and correlations of deeper layers are those of the (q, p) map",
            giorlandino_goldt.fit,
            "the (q, p) map, from which it takes the logits of deeper layers, says nothing of it",
        ),
        Assumption("logits are small", _small_logits, "its logits are so far apart that single keys take all"),
        Assumption("rows of logits are independent", _many_channels, "its heads have {head_width} channels"),
        Assumption(
            "queries see all keys, or all before them",
            lambda one: float(one.window is None or one.window >= one.context),
            "its queries see a window of {window} tokens",
        ),
        Assumption(
            "no key is preferred for its place",
            lambda one: {"alibi": 0.0, "relative": 0.5, "rotary": 0.9}.get(one.positions, 1.0),
            "its {positions} positions prefer near keys",
        ),
        Assumption(
            "tokens are apart",
            lambda one: 1 - max(one.correlation, 0.0) ** 2,
            "its tokens are alike from the start",
        ),
    ),
    gives=GIVES,
)
def MIND_THE_GAP(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows of attention, layer by layer: its outlier, its bulk, and what it passes on of differences."""
    return layer_rows(architecture)
