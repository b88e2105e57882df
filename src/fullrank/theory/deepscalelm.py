r"""DeepScaleLM (arXiv 2403.09635): moments through the parts of a transformer that act on one token at a time.

**Assumes** independent weights of mean 0, wide layers, tokens with entries of mean 0 and mean square q whose pairs all
have the product p = rq; ReLU; dropout of probability p of the inverted kind. Attention is in `deepscalelm_attention`.

**Symbols.** q = σ² `size`, r `correlation` between tokens, $\sigma_w$ `std` of the entries of a weight, `gain` the
variance gain of a product of weights. Gradients: $\sigma_g^2$ `gradient`, their correlation between tokens $r_g$
`gradient_correlation`. Formulas with [derived] are of this file, the others of the paper's code. All broadcast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.theory.activations import arc_cosine

__all__ = [
    "dropout_correlation",
    "dropout_variance",
    "feed_forward_backward",
    "feed_forward_correlation",
    "feed_forward_variance",
    "layer_norm_backward",
    "linear_backward",
    "linear_variance",
    "relu_backward_correlation",
    "relu_mean",
    "relu_variance",
]

Array = NDArray[np.float64]


def _all(*values: ArrayLike) -> list[Array]:
    return [np.asarray(one, dtype=np.float64) for one in values]


# ------------------------------------------------------------ linear, dropout, norm, ReLU


def linear_variance(size: ArrayLike, *, std: ArrayLike, inputs: ArrayLike) -> Array:
    r"""$d_{in}\sigma_w^2q$, and the same factor for covariances: a linear layer keeps correlations."""
    q, w, n = _all(size, std, inputs)
    return np.asarray(n * np.square(w) * q)


def linear_backward(gradient: ArrayLike, *, std: ArrayLike, outputs: ArrayLike) -> Array:
    r"""$d_{out}\sigma_w^2\sigma_g^2$."""
    g, w, n = _all(gradient, std, outputs)
    return np.asarray(n * np.square(w) * g)


def dropout_variance(size: ArrayLike, *, dropout: ArrayLike) -> Array:
    r"""$q/(1-p)$, forwards and backwards."""
    q, p = _all(size, dropout)
    return np.asarray(q / (1 - p))


def dropout_correlation(correlation: ArrayLike, *, dropout: ArrayLike) -> Array:
    r"""$(1-p)\,r$: covariances stay and variances grow."""
    r, p = _all(correlation, dropout)
    return np.asarray((1 - p) * r)


def layer_norm_backward(gradient: ArrayLike, *, size: ArrayLike) -> Array:
    r"""$\sigma_g^2/q$, up to the two directions of d that the norm projects out."""
    g, q = _all(gradient, size)
    return np.asarray(g / q)


def relu_mean(size: ArrayLike) -> Array:
    r"""$\sqrt{q/2\pi}$."""
    return np.asarray(np.sqrt(np.asarray(size, float) / (2 * np.pi)))


def relu_variance(size: ArrayLike) -> Array:
    r"""$q(\pi-1)/2\pi$; the mean square is q/2, and half of a gradient's variance passes back."""
    return np.asarray(np.asarray(size, float) * (np.pi - 1) / (2 * np.pi))


def relu_backward_correlation(correlation: ArrayLike, *, gradient_correlation: ArrayLike) -> Array:
    r"""$r_g(\pi - \arccos r)/\pi$ of gradients behind a ReLU [derived]: the share of units on in both tokens."""
    r, r_g = _all(correlation, gradient_correlation)
    return np.asarray(r_g * (1 - np.arccos(np.clip(r, -1, 1)) / np.pi))


# ------------------------------------------------------------ feed-forward


def feed_forward_variance(size: ArrayLike, *, gain: ArrayLike, dropout: ArrayLike = 0.0) -> Array:
    r"""$g\,q/[2(1-p)]$ with $g = d\sigma_1^2\,d_{ff}\sigma_2^2$: linear, ReLU, linear, dropout.

    Args:
        size: q.
        gain: g.
        dropout: p.

    Returns:
        Variance of the entries of what is written.
    """
    q, g = _all(size, gain)
    return dropout_variance(g * q / 2, dropout=dropout)


def feed_forward_correlation(correlation: ArrayLike, *, dropout: ArrayLike = 0.0) -> Array:
    r"""$r_{ffn} = (1-p)\,[r + (\sqrt{1-r^2} - r\arccos r)/\pi]$; the bracket is `arc_cosine`.

    Args:
        correlation: r of the input.
        dropout: p.

    Returns:
        Correlation between tokens of what is written.
    """
    return dropout_correlation(arc_cosine(correlation), dropout=dropout)


def feed_forward_backward(gradient: ArrayLike, *, gain: ArrayLike, dropout: ArrayLike = 0.0) -> Array:
    r"""$g\,\sigma_g^2/[2(1-p)]$ with $g = d\sigma_2^2\,d_{ff}\sigma_1^2$, the same as forwards.

    Args:
        gradient: σ_g².
        gain: g.
        dropout: p.

    Returns:
        Variance of the gradient of the input.
    """
    return feed_forward_variance(gradient, gain=gain, dropout=dropout)
