r"""Attention entropy (arXiv 2303.06296, 2410.13060, 2501.03489): floors, ceilings, and how a released penalty scales.

**Assumes** a softmax over the logits of one row, in nats; the floor is exact on the sphere of logits of one norm, the
ceiling is that of a causal row that looks at every key alike.

**Symbols.** $T$ `keys` that a row sees, $\sigma$ `logit_norm` $= \|a - \bar a\|_2$ of the row's logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["causal_ceiling", "entropy_floor", "mean_reduced_weight", "norm_for_entropy", "row_logit_norm"]

Array = NDArray[np.float64]


def entropy_floor(logit_norm: ArrayLike, *, keys: ArrayLike) -> Array:
    r"""The least entropy that a row of $T$ logits of norm σ about their mean can have.

    $\log(1 + (T-1)\kappa) + \frac{\sigma\sqrt{T(T-1)}\,\kappa}{1+(T-1)\kappa}$ with
    $\kappa = e^{-\sigma\sqrt{T/(T-1)}}$, reached with one logit up and the others equal. The theorem puts
    $\|W_KW_Q^\top\|\,\|XX^\top\|$ for σ, which is loose beyond use: take the row's own (`row_logit_norm`).

    Args:
        logit_norm: σ ≥ 0, of logits as the softmax sees them (scaled, visible keys alone).
        keys: T ≥ 2.

    Returns:
        Nats, in [0, log T].
    """
    count, sigma = np.asarray(keys, float), np.asarray(logit_norm, float)
    kappa = np.exp(-sigma * np.sqrt(count / (count - 1)))
    total = 1 + (count - 1) * kappa
    return np.asarray(np.log(total) + sigma * np.sqrt(count * (count - 1)) * kappa / total)


def row_logit_norm(logits: ArrayLike) -> Array:
    r"""$\|a - \bar a\|_2$ over the last axis: what certifies a row's entropy, of shape (…)."""
    rows = np.asarray(logits, float)
    return np.asarray(np.linalg.norm(rows - rows.mean(-1, keepdims=True), axis=-1))


def norm_for_entropy(entropy: ArrayLike, *, keys: ArrayLike) -> Array:
    r"""The logit norm up to which no row of T keys can have less than an entropy: the floor, solved for σ.

    Args:
        entropy: nats, in (0, log T].
        keys: T.

    Returns:
        σ, by bisection; the floor falls in σ.
    """
    wanted, count = np.broadcast_arrays(np.asarray(entropy, float), np.asarray(keys, float))
    low, high = np.zeros(wanted.shape), np.full(wanted.shape, 1.0)
    while np.any(short := entropy_floor(high, keys=count) > wanted):
        high = np.where(short, 2 * high, high)
    for _ in range(80):
        middle = (low + high) / 2
        above = entropy_floor(middle, keys=count) > wanted
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)


def causal_ceiling(context: ArrayLike) -> Array:
    r"""$\ln(T!)/T$, the mean entropy of causal rows that look at every key alike: below log T.

    Args:
        context: T ≥ 1.

    Returns:
        Nats.
    """
    from scipy.special import gammaln

    count = np.asarray(context, float)
    return np.asarray(gammaln(count + 1) / count)


def mean_reduced_weight(weight: ArrayLike, *, batch: ArrayLike, queries: ArrayLike) -> Array:
    r"""λ of a penalty that is a mean over rows, for one that sums over batch and queries, as the released code does.

    Args:
        weight: λ of the summed penalty.
        batch: sequences.
        queries: rows of each.

    Returns:
        λ · batch · queries.
    """
    return np.asarray(np.asarray(weight, float) * np.asarray(batch, float) * np.asarray(queries, float))
