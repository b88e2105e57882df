r"""Batch normalisation (arXiv 2003.01652, 2106.03970, 2310.02012): rank and orthogonality of a batch at any depth.

**Assumes** linear layers $H^+ = \mathrm{BN}(W H)$, or $\mathrm{BN}((I + \gamma W)H)$, weights fresh in every layer with
independent Gaussian entries unless said, BN without centring: $\mathrm{BN}(M) = \mathrm{diag}(MM^\top)^{-1/2}M$, rows
being features. Rows of an architecture, with the centring that real batch norms do: `batchnorm_course`. Layer
norms and nonlinear units: `batchnorm_isometry`.

**Symbols.** $H$ of shape (d, n): `width` $d$ features of $n$ `samples`; $M = HH^\top/n$ its `covariance`, with a
diagonal of ones under BN; $G = H^\top H/\|H\|_F^2$. `participation` $r = \mathrm{Tr}(M)^2/\|M\|_F^2$; `soft_rank`
$\mathrm{rank}_\tau$ counts eigenvalues of $M$ that are at least τ times their mean; orthogonality gap
$V = \|G - I/n\|_F$. $l$ `layers`, $\alpha$ `least`, a lower bound of $\sigma_{\min}(H_k)$ where $\|H_k\|_F = 1$.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError

__all__ = [
    "SoftRank",
    "covariance_step",
    "orthogonality_contraction",
    "orthogonality_gap_bound",
    "orthogonality_gap_plateau",
    "orthogonality_gap_square",
    "product_exponents",
    "product_rank",
    "soft_rank_bound",
    "stationary_soft_rank",
]

Array = NDArray[np.float64]


# ------------------------------------------------------------ with a batch norm: soft rank


def covariance_step(covariance: ArrayLike, weights: ArrayLike, *, gamma: float = float("inf")) -> Array:
    r"""One layer of the M-recursion, $M^+ = D^{-1/2}\hat W M \hat W^\top D^{-1/2}$, $\hat W = I + \gamma W$.

    $D$ is the diagonal of $\hat W M\hat W^\top$, so that every feature has variance 1 again.

    Args:
        covariance: M, of shape (…, d, d).
        weights: W, of the same shape.
        gamma: γ; infinite for no identity, $\hat W = W$.

    Returns:
        Of the same shape.
    """
    W = np.asarray(weights, float)
    W = W if np.isinf(gamma) else np.eye(W.shape[-1]) + gamma * W
    moved = W @ np.asarray(covariance, float) @ W.swapaxes(-1, -2)
    scale = 1 / np.sqrt(np.diagonal(moved, axis1=-2, axis2=-1))
    return np.asarray(scale[..., :, None] * moved * scale[..., None, :])


@dataclass(frozen=True)
class SoftRank:
    """Means over depth, of a batch norm's stationary state.

    Attributes:
        soft_rank: rank_τ.
        soft_rank_stderr: its standard error, over chains.
        participation: r.
        participation_stderr: its standard error.
        layers: how many entered, of all chains together.
    """

    soft_rank: float
    soft_rank_stderr: float
    participation: float
    participation_stderr: float
    layers: int


def stationary_soft_rank(
    width: int, *, gamma: float = float("inf"), steps: int = 1000, chains: int = 16, tau: float = 0.5, seed: int
) -> SoftRank:
    r"""Soft rank and participation ratio that batch-normalised layers settle at, by running the M-recursion.

    It starts at $M_0 = I$; the first half of each chain is left out. Both grow with about $\sqrt d$: $r$ is .8 to .95
    of it, $\mathrm{rank}_{1/2}$ grows with $d^{.65}$ up to 256. γ matters little but for how long a chain has to be: a
    small one mixes slowly, over about 1/γ² layers. $O(\text{steps} \cdot \text{chains} \cdot d^3)$.

    Args:
        width: d.
        gamma: γ; infinite for no identity.
        steps: layers of a chain.
        chains: independent ones, side by side, 2 or more.
        tau: τ in (0, 1).
        seed: of the weights.

    Returns:
        Means with their standard errors.

    Raises:
        TheoryError: for fewer than two chains or steps.
    """
    if chains < 2 or steps < 2:
        raise TheoryError(f"steps={steps} and chains={chains} must both be 2 or more: errors are taken over chains.")
    rng = np.random.default_rng(seed)
    M = np.tile(np.eye(width), (chains, 1, 1))
    soft, ratio, kept = np.zeros(chains), np.zeros(chains), 0
    for step in range(steps):
        M = covariance_step(M, rng.standard_normal(M.shape), gamma=gamma)
        if 2 * step >= steps:
            soft += (np.linalg.eigvalsh(M) >= tau).sum(-1)  # of mean 1
            ratio += width**2 / np.square(M).sum((-2, -1))
            kept += 1
    both = np.stack([soft, ratio]) / kept
    mean, error = both.mean(1).tolist(), (both.std(1, ddof=1) / chains**0.5).tolist()
    return SoftRank(mean[0], error[0], mean[1], error[1], kept * chains)


def soft_rank_bound(participation: ArrayLike, *, tau: ArrayLike = 0.5) -> Array:
    r"""$\mathrm{rank}_\tau \ge (1-\tau)^2\,r$: holds for every matrix, by Paley and Zygmund on its eigenvalues.

    With $r = \Omega(\sqrt d)$ under a batch norm it is the paper's lower bound at any depth.

    Args:
        participation: r.
        tau: τ in [0, 1).

    Returns:
        A lower bound of the soft rank.
    """
    return np.asarray(np.square(1 - np.asarray(tau, float)) * np.asarray(participation, float))


# ------------------------------------------------------------ with a batch norm: orthogonality


def orthogonality_gap_bound(layers: ArrayLike, *, width: ArrayLike, samples: ArrayLike, least: ArrayLike) -> Array:
    r"""The theorem's $\mathbb E V(H_{l+1}) \le 2(1 - \tfrac{2\alpha}{3})^l + \tfrac{3n}{\alpha\sqrt d}$.

    Args:
        layers: l.
        width: d ≥ n.
        samples: n.
        least: α, at most 1/√n.

    Returns:
        The bound; it says nothing where it exceeds √(1 − 1/n), as it does unless d is far above n³.
    """
    alpha = np.asarray(least, float)
    decay = 2 * (1 - 2 * alpha / 3) ** np.asarray(layers, float)
    return np.asarray(decay + 3 * np.asarray(samples, float) / (alpha * np.sqrt(np.asarray(width, float))))


def orthogonality_contraction(samples: ArrayLike) -> Array:
    r"""$n/(n+2)$, by which a layer multiplies small deviations $G - I/n$, in expectation.

    Rows of $WH$ are Gaussian of covariance $G$, brought to norm 1: $\mathbb E[gg^\top/\|g\|^2]$ to first order.

    Args:
        samples: n.

    Returns:
        Below 1.
    """
    n = np.asarray(samples, float)
    return np.asarray(n / (n + 2))


def orthogonality_gap_square(*, width: ArrayLike, samples: ArrayLike, hidden: ArrayLike = np.inf) -> Array:
    r"""$\mathbb E V^2 = \tfrac{(n-1)(n+2)^2}{4n(n+1)d}$, once the start is forgotten.

    Every layer adds $\tfrac1d(1-\tfrac1n)$, by the finite number of its rows, and multiplies what was there by
    $\kappa^2$, $\kappa = \tfrac n{n+2}$. Where a layer is a product of two weights, with `hidden` $m$ rows between
    them, the first adds $\kappa^2\tfrac{(n+2)(n-1)}{n^2m}$. Accurate to some 10 % for $n^2 \lesssim 8d$; more samples
    settle lower.

    Args:
        width: d.
        samples: n ≥ 2.
        hidden: m.

    Returns:
        Mean of V² over depth.
    """
    n, d, m = (np.asarray(one, float) for one in (samples, width, hidden))
    kept = orthogonality_contraction(n) ** 2
    added = (1 - 1 / n) / d + kept * (n + 2) * (n - 1) / (n**2 * m)
    return np.asarray(added / (1 - kept))


def orthogonality_gap_plateau(*, width: ArrayLike, samples: ArrayLike, hidden: ArrayLike = np.inf) -> Array:
    r"""Mean of V over depth, once the start is forgotten: it falls with $1/\sqrt d$.

    The root of `orthogonality_gap_square`, times what a mean is below a root mean square: fluctuations of $G$ have no
    preferred direction among its $k = \tfrac{n(n+1)}2 - 1$ dimensions, so that V is chi-distributed with k degrees.

    Args:
        width: d.
        samples: n ≥ 2.
        hidden: m.

    Returns:
        Mean of V, accurate to 5 % for n² ≲ 8d.
    """
    from scipy.special import gammaln

    n = np.asarray(samples, float)
    k = n * (n + 1) / 2 - 1
    below_root = np.exp(gammaln((k + 1) / 2) - gammaln(k / 2)) * np.sqrt(2 / k)
    return np.asarray(below_root * np.sqrt(orthogonality_gap_square(width=width, samples=samples, hidden=hidden)))


# ------------------------------------------------------------ without one


def product_exponents(width: int) -> Array:
    r"""Growth of the logarithm of each singular value per layer in a product of Gaussian matrices.

    $\tfrac12[\log 2 + \psi(\tfrac{d-i+1}2)]$ for entries of variance 1 (Newman 1986): without a norm singular values
    part for ever, and rank is lost with depth whatever the weights' size.

    Args:
        width: d.

    Returns:
        Of shape (d,), falling.
    """
    from scipy.special import digamma

    return np.asarray((np.log(2) + digamma(np.arange(width, 0, -1) / 2)) / 2)


def product_rank(layers: ArrayLike, *, width: int, eps: float = float(np.finfo(np.float64).eps)) -> Array:
    r"""Numerical rank of a linear net without norms: singular values within $d\,\epsilon$ of the first.

    Counts $i$ with $l\,(\mu_1 - \mu_i) < -\log(d\epsilon)$ for the exponents μ of `product_exponents`. What a published
    curve of numerical rank over depth shows is mostly its ε: the participation ratio has fallen long before.

    Args:
        layers: l.
        width: d.
        eps: of the dtype in which the rank is taken.

    Returns:
        Whole numbers, 1 to d, of the shape of `layers`.
    """
    exponents = product_exponents(width)
    behind = np.asarray(layers, float)[..., None] * (exponents[0] - exponents)
    return np.asarray((behind < -np.log(width * eps)).sum(-1), float)
