r"""Wu et al. (arXiv 2405.18781; 2502.01951): how fast masked attention draws tokens together.

**Assumes** layers $X^+ = A X W_V$ with $A$ row-stochastic, zero where the mask is, no skip and no MLP; `spread`,
`layers_until` and the second eigenvalue further that $A$ is the same in every layer, as it is where logits are near 0
(uniform attention over what a query sees). A norm that rescales rows does not change the rates, nor do random $W_V$.

**Symbols.** $N$ tokens, $A$ `attention` of shape (queries, keys), $C = I - \mathbf 1\mathbf 1^\top/N$,
$\mu(X) = \|CX\|_F$ the spread, $\mu/\|X\|_F$ the metric `residual`, $\epsilon$ `least` weight on an edge of the mask,
$r$ its `radius` (`wu_masks_layernorm_graphs`). Equilibria under a norm: `wu_masks_layernorm_equilibria`.

With $A$ fixed $\mu \sim |\lambda_2|^t$ over $t$ layers: at once for full attention, ½ a layer for every causal mask,
slowest for a two-sided window, whose $1 - |\lambda_2|$ falls with the square of its radius.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError
from fullrank.theory.wu_masks_layernorm_graphs import checked_mask

__all__ = [
    "bound_rate",
    "causal_exponent",
    "layers_at_rate",
    "layers_until",
    "normalised_spread",
    "second_eigenvalue",
    "soft_logit_spread",
    "spread",
    "uniform_attention",
]

Array = NDArray[np.float64]

_DENSE = 1024
_SPARSE = 0.1


def uniform_attention(mask: ArrayLike) -> Array:
    """Every query gives equal weight to all keys that it sees.

    Args:
        mask: of shape (queries, keys), boolean.

    Returns:
        Row-stochastic, of the same shape.
    """
    seen = checked_mask(mask)
    return np.asarray(seen / seen.sum(1, keepdims=True))


# ------------------------------------------------------------ rates


def second_eigenvalue(attention: ArrayLike) -> float:
    r"""$|\lambda_2|$, by which the spread falls a layer in the end, for a row-stochastic matrix used in every layer.

    Eigenvalues are those of the blocks of tokens that see one another by some path, which for a causal mask are the
    diagonal entries, without error; each block by a symmetric solver where it is one up to scaling, as uniform
    attention of a symmetric mask is. Dense up to 1024 tokens, banded for windows, by Lanczos or Arnoldi beyond.

    Args:
        attention: of shape (N, N), with rows that add to 1.

    Returns:
        In [0, 1]; 1 where two groups of tokens hear nothing of each other: then nothing collapses. 0 for one token.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    A = _stochastic(attention)
    count, label = connected_components(csr_array(A), directed=True, connection="strong")
    sizes = np.bincount(label, minlength=count)
    moduli = [np.abs(np.diagonal(A)[sizes[label] == 1])]
    for block in np.flatnonzero(sizes > 1):
        inside = np.flatnonzero(label == block)
        moduli.append(_largest_moduli(A[np.ix_(inside, inside)]))
    found = np.sort(np.concatenate(moduli))
    return float(min(found[-2], 1.0)) if found.size > 1 else 0.0


def causal_exponent(diagonals: ArrayLike) -> Array:
    r"""$\max_{i\ge2}\ \mathrm{mean}_t \log A^t_{ii}$: exponent of the spread per layer under a causal mask.

    A product of triangular matrices has the products of their diagonals for eigenvalues; the first token's is 1.
    Attention may differ from layer to layer. For uniform attention −log 2, of the second token, for every N.

    Args:
        diagonals: weight that each query gives to itself, of shape (…, layers, N).

    Returns:
        Of shape (…); −∞ where no query but the first sees itself.
    """
    weights = np.asarray(diagonals, float)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(weights[..., 1:]).mean(-2).max(-1))


def layers_at_rate(fall: ArrayLike, contraction: ArrayLike) -> Array:
    r"""$\log(\text{fall})/\log(\text{contraction})$: layers until the spread has fallen, once it falls at its rate.

    Args:
        fall: spread after over spread before, in (0, 1).
        contraction: |λ₂|, or the exponential of `causal_exponent`, in [0, 1].

    Returns:
        Layers, not rounded: infinite at 1, 0 at 0. A one-sided window first keeps its spread for about its radius,
        which this leaves out; `layers_until` does not.
    """
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(np.asarray(fall, float)) / np.abs(np.log(np.asarray(contraction, float))))


def bound_rate(least: ArrayLike, radius: ArrayLike) -> Array:
    r"""The theorem's rate, $\mu(X^t) \le C\,(1-\epsilon^r)^{t/r}$: $1 - (1-\epsilon^r)^{1/r}$ of the spread a layer.

    It orders masks by their radius, which is what it is for. As a number it is far from what is seen: for a window of
    32 tokens 2e-7 a layer, where 1e-2 is lost.

    Args:
        least: ε, lower bound of the weight on every edge of the mask, in (0, 1].
        radius: r.

    Returns:
        Share of the spread that is lost a layer at least; given so because it is often too small to show beside 1.
    """
    weight, r = np.asarray(least, float), np.asarray(radius, float)
    with np.errstate(divide="ignore"):
        return np.asarray(-np.expm1(np.log1p(-(weight**r)) / r))


# ------------------------------------------------------------ the spread of tokens


def spread(attention: ArrayLike, depth: int) -> Array:
    r"""$\|C A^t\|_F$ for $t$ = 0 … depth: root mean square of μ over layers, for independent tokens of norm 1.

    For tokens of any Gram matrix with mean cosine ρ multiply by $\sqrt{1-\rho}$; orthogonal $W_V$ change nothing.

    Args:
        attention: A, of shape (N, N), the same in every layer.
        depth: layers.

    Returns:
        Of shape (depth + 1,); √(N − 1) at first.
    """
    return _courses(attention, depth)[0]


def normalised_spread(attention: ArrayLike, depth: int) -> Array:
    r"""μ over layers where every row is brought to norm 1 again: about $\sqrt N\,\|CA^t\|_F / \|A^t\|_F$.

    The norm scales mean and deviations alike: tokens go on collapsing at the rate of attention alone, unless $W_V$
    was made to prevent it (`wu_masks_layernorm_equilibria`). Exact where rows stay equally long, as in full attention
    and inside a window.

    Args:
        attention: A, of shape (N, N).
        depth: layers.

    Returns:
        Of shape (depth + 1,).
    """
    apart, whole = _courses(attention, depth)
    return np.asarray(np.asarray(attention).shape[0] ** 0.5 * apart / whole)


def layers_until(attention: ArrayLike, *, fall: float) -> float:
    r"""Layers until the spread of independent tokens has fallen by a factor: the first with $\|CA^t\|_F \le$ fall $\|C\|_F$.

    By repeated squaring, $O(N^3 \log t)$, so that a window's thousands of layers cost no more than a few dozen.

    Args:
        attention: A, of shape (N, N), the same in every layer.
        fall: in (0, 1).

    Returns:
        A whole number; infinite where it has not fallen after 2⁴⁰ layers.
    """  # noqa: E501 - a formula in one piece
    A = _stochastic(attention)
    count = len(A)
    C = np.eye(count) - 1 / count
    least = fall * max(count - 1, 0) ** 0.5
    powers = [C @ A]  # (CA)^t = C A^t, without the mean that would drown what is left
    while np.linalg.norm(powers[-1]) > least:
        if len(powers) > 40:
            return float("inf")
        powers.append(powers[-1] @ powers[-1])
    now, layers = C, 0
    for exponent in reversed(range(len(powers))):
        further = now @ powers[exponent]
        if np.linalg.norm(further) > least:
            now, layers = further, layers + 2**exponent
    return float(layers + 1)


def soft_logit_spread(
    mu: ArrayLike, *, tokens: ArrayLike, logit_std: ArrayLike, participation: ArrayLike | None = None
) -> Array:
    r"""μ after one layer of full attention with small logits, $\mu^+ = s\,\mu^3/(N\sqrt{r})$: a cubic law with its constant.

    Uniform attention would leave none. To first order in the logits $\ell_{ij} = x_i^\top M x_j$, of random weights,
    only what differs between queries counts: $x_i^+ - \bar x^+ = \tfrac1N\sum_j (\delta_i^\top M\delta_j)\,\delta_j$
    with $\delta_i = x_i - \bar x$, so that $\mathbb E\mu^{+2} = s^2\mu^2\|\Delta^\top\Delta\|_F^2/N^2$.

    Args:
        mu: μ before.
        tokens: N.
        logit_std: s, standard deviation of a logit between two tokens of norm 1.
        participation: r, participation ratio of the deviations; by default N, of nearly orthogonal ones.

    Returns:
        Root mean square of μ after the layer, for values that keep lengths.
    """  # noqa: E501 - a formula in one piece
    before, count = np.asarray(mu, float), np.asarray(tokens, float)
    ratio = count if participation is None else np.asarray(participation, float)
    return np.asarray(np.asarray(logit_std, float) * before**3 / (count * np.sqrt(ratio)))


# ------------------------------------------------------------ inner workings


def _stochastic(attention: ArrayLike) -> Array:
    A = np.asarray(attention, float)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.size:
        raise TheoryError(f"attention of shape {A.shape} must be square, of shape (queries, keys).")
    if not (A >= 0).all() or not np.allclose(A.sum(1), 1, atol=1e-6):
        raise TheoryError("attention must be row-stochastic: no negative weights, and rows that add to 1.")
    return A


def _courses(attention: ArrayLike, depth: int) -> tuple[Array, Array]:
    """‖CAᵗ‖_F and ‖Aᵗ‖_F for t = 0 … depth."""
    from scipy.sparse import csr_array

    A: Any = _stochastic(attention)
    count = len(A)
    if np.count_nonzero(A) < _SPARSE * A.size:
        A = csr_array(A)
    apart, mean = np.eye(count) - 1 / count, np.full((1, count), 1 / count)
    found = []
    for layer in range(depth + 1):
        if layer:
            apart, mean = apart @ A, mean @ A
        inside = float(np.linalg.norm(apart))
        found.append((inside, float(np.hypot(inside, count**0.5 * np.linalg.norm(mean)))))
    both = np.asarray(found)
    return both[:, 0], both[:, 1]


def _largest_moduli(block: Array) -> Array:
    """At least the two largest moduli of eigenvalues of an irreducible block."""
    from scipy.linalg import eigvals_banded
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import eigs, eigsh

    count = len(block)
    degree = 1 / block.max(1)  # of uniform attention: how many keys a query sees
    weighed = degree[:, None] * block
    symmetric = np.array_equal(weighed > 0, weighed.T > 0) and np.allclose(weighed, weighed.T, rtol=1e-12, atol=0)
    root = np.sqrt(degree)
    same = root[:, None] * block / root if symmetric else block
    start = np.random.default_rng(0).standard_normal(count)
    stored: Any = csr_array(same) if np.count_nonzero(same) < _SPARSE * same.size else same
    if not symmetric:
        solved = np.linalg.eigvals(same) if count <= _DENSE else eigs(stored, k=2, v0=start)[0]
        return np.asarray(np.abs(solved))
    rows, columns = np.nonzero(same)
    band = int(np.abs(rows - columns).max())
    if band <= count // 16:
        below = np.stack([np.pad(np.diagonal(same, -k), (0, k)) for k in range(band + 1)])
        return np.asarray(np.abs(eigvals_banded(below, lower=True)))
    if count <= _DENSE:
        return np.asarray(np.abs(np.linalg.eigvalsh(same)))
    return np.asarray(np.abs(eigsh(stored, k=2, v0=start, return_eigenvectors=False)))
