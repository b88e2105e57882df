r"""Wu et al. (arXiv 2405.18781): with a norm, tokens of any rank can be an equilibrium of attention.

**Assumes** layers $x_i^+ = y_i/\|y_i\|$, $Y = A X W_V$: rows brought to norm 1 without centring, attention $A$ that
does not depend on the tokens ($W_Q = W_K = 0$), the same $A$ and $W_V$ in every layer.

**Symbols.** $N$ tokens of width $d$; `tokens` $X$ of shape (N, d), rows of norm 1; `attention` $A$ of shape (N, N),
row-stochastic; `values` $W_V$ of shape (d, d), applied from the right; `scales` $\Lambda$ of shape (N,), positive,
the lengths $\|y_i\|$ at the equilibrium $A X W_V = \Lambda X$.

Random $W_V$ do not prevent collapse: mean and deviations of the tokens grow alike under their products, and attention
shrinks the deviations. What holds rank is one strongly non-normal $W_V$, used in every layer, and it holds it for
starts near the equilibrium: `wu_masks_layernorm_basins`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError

__all__ = [
    "bidiagonal_values",
    "is_stable",
    "local_multipliers",
    "normalised_layer",
    "token_multipliers",
    "two_token_equilibria",
    "two_token_values",
    "values_for",
]

Array = NDArray[np.float64]


def normalised_layer(tokens: ArrayLike, attention: ArrayLike, values: ArrayLike) -> Array:
    """One layer, A X W_V with rows of norm 1.

    Args:
        tokens: X, of shape (…, N, d).
        attention: A, of shape (N, N).
        values: W_V, of shape (d, d).

    Returns:
        Of the shape of `tokens`.
    """
    moved = np.asarray(attention, float) @ np.asarray(tokens, float) @ np.asarray(values, float)
    return np.asarray(moved / np.linalg.norm(moved, axis=-1, keepdims=True))


# ------------------------------------------------------------ to make one


def values_for(tokens: ArrayLike, attention: ArrayLike, scales: ArrayLike) -> Array:
    r"""$W_V = X^+A^{-1}\Lambda X$, of which wanted tokens are an equilibrium: $A X W_V = \Lambda X$.

    For a causal mask its eigenvalues are $\Lambda_i/A_{ii}$. Any left eigenvector of it, as all tokens alike, is an
    equilibrium as well, so that rank 1 and rank N stand side by side. Whether tokens stay there: `is_stable`.

    Args:
        tokens: X, N ≤ d independent rows, brought to norm 1.
        attention: A, invertible, row-stochastic.
        scales: Λ, positive, of shape (N,) or one number.

    Returns:
        W_V, of shape (d, d); zero on what is orthogonal to all tokens.

    Raises:
        TheoryError: for dependent tokens, attention that is not invertible, or scales that are not positive.
    """
    with np.errstate(invalid="ignore"):  # a row of zeros is refused below
        X = unit_rows(tokens)
    A, lengths = np.asarray(attention, float), np.broadcast_to(np.asarray(scales, float), len(X))
    rank = int(np.linalg.matrix_rank(np.asarray(tokens, float)))
    if rank < len(X):
        raise TheoryError(f"tokens of shape {X.shape} must be independent: their rank is {rank}.")
    if A.shape != (len(X), len(X)) or np.linalg.matrix_rank(A) < len(X):
        raise TheoryError(f"attention of shape {A.shape} must be invertible, of shape {(len(X), len(X))}.")
    if not (lengths > 0).all():
        raise TheoryError(f"scales={lengths.tolist()} must be positive: they are lengths of rows.")
    return np.asarray(np.linalg.pinv(X) @ np.linalg.solve(A, lengths[:, None] * X))


def two_token_values(contraction: float, shear: float) -> Array:
    r"""$W_V = \begin{pmatrix}a & b\\ 0 & 1\end{pmatrix}$ of the two-token example.

    Args:
        contraction: a in (0, 1).
        shear: b.

    Returns:
        Of shape (2, 2).
    """
    return np.array([[contraction, shear], [0.0, 1.0]])


def two_token_equilibria(contraction: ArrayLike, shear: ArrayLike) -> Array:
    r"""Second tokens $(p, q)$ of rank 2, of `two_token_values` with causal uniform attention and a first token (0, 1).

    $p = \frac{-b \pm (1-a)\sqrt{b^2 - a(2-a)}}{b^2 + (1-a)^2}$, $q = -\frac{bp+1}{1-a}$: there are such equilibria
    where $b^2 \ge a(2-a)$.

    Args:
        contraction: a in (0, 1).
        shear: b.

    Returns:
        Of shape (…, 2, 2), the stable one first, then the unstable one; NaN where there is none.
    """
    a, b = np.broadcast_arrays(np.asarray(contraction, float), np.asarray(shear, float))
    with np.errstate(invalid="ignore"):
        root = (1 - a) * np.sqrt(b**2 - a * (2 - a))
    sign = np.where(b < 0, -1.0, 1.0)
    p = np.stack([-b + sign * root, -b - sign * root], -1) / (b**2 + (1 - a) ** 2)[..., None]
    q = -(b[..., None] * p + 1) / (1 - a)[..., None]
    return np.stack([p, q], -1)


def bidiagonal_values(width: int, contraction: float, shear: float) -> Array:
    r"""The two-token example's $W_V$ in more dimensions: diagonal $a^{d-1}, \ldots, a, 1$, above it $b\,a^{d-2}, \ldots, b$.

    With causal uniform attention and N = d = 3 … 8 a few per cent of random starts end at rank 2, none higher.

    Args:
        width: d.
        contraction: a in (0, 1).
        shear: b.

    Returns:
        Of shape (d, d).
    """  # noqa: E501 - a formula in one piece
    diagonal = contraction ** np.arange(width - 1.0, -1.0, -1.0)
    return np.asarray(np.diag(diagonal) + np.diag(shear * diagonal[1:], 1))


# ------------------------------------------------------------ stability


def local_multipliers(tokens: ArrayLike, attention: ArrayLike, values: ArrayLike) -> Array:
    r"""By how much a layer multiplies small deviations from an equilibrium: moduli of the eigenvalues of its Jacobian.

    Of $\mathrm dx_i^+ = \sum_j \tfrac{A_{ij}}{\Lambda_i}\,\mathrm dx_j W_V P_i$, with $P_i = I - x_i^\top x_i$, on
    deviations that keep rows at norm 1.

    Args:
        tokens: X, an equilibrium, of shape (N, d).
        attention: A.
        values: W_V.

    Returns:
        Of shape (N(d − 1),), in falling order. Stable where all are below 1.
    """
    X, W = unit_rows(tokens), np.asarray(values, float)
    A, lengths = _at_equilibrium(X, attention, W)
    count, width = X.shape
    # an orthonormal basis of each token's tangent space: all left singular vectors of x_i but the first
    tangent = np.linalg.svd(X[:, :, None])[0][:, :, 1:]
    turned = np.einsum("jaf,ab,ibe->ijef", tangent, W, tangent)
    jacobian = (turned * (A / lengths[:, None])[:, :, None, None]).transpose(0, 2, 1, 3)
    size = count * (width - 1)
    return np.sort(np.abs(np.linalg.eigvals(jacobian.reshape(size, size))))[::-1]


def token_multipliers(tokens: ArrayLike, attention: ArrayLike, values: ArrayLike) -> Array:
    r"""Each token's own largest multiplier, the others held: spectral radius of $\tfrac{A_{ii}}{\Lambda_i}P_iW_VP_i$.

    Under a causal mask token i hears only those before it, and the largest of these is the largest of
    `local_multipliers`.

    Args:
        tokens: X, an equilibrium, of shape (N, d).
        attention: A.
        values: W_V.

    Returns:
        Of shape (N,).
    """
    X, W = unit_rows(tokens), np.asarray(values, float)
    A, lengths = _at_equilibrium(X, attention, W)
    projection = np.eye(X.shape[1]) - X[:, :, None] * X[:, None, :]
    radius = np.abs(np.linalg.eigvals(projection @ W @ projection)).max(-1)
    return np.asarray(radius * np.diagonal(A) / lengths)


def is_stable(tokens: ArrayLike, attention: ArrayLike, values: ArrayLike) -> bool:
    """Whether tokens that start close enough to an equilibrium come back to it."""
    return bool(local_multipliers(tokens, attention, values)[0] < 1)


def unit_rows(tokens: ArrayLike) -> Array:
    """Tokens, each of norm 1."""
    X = np.asarray(tokens, float)
    return np.asarray(X / np.linalg.norm(X, axis=-1, keepdims=True))


def _at_equilibrium(X: Array, attention: ArrayLike, W: Array) -> tuple[Array, Array]:
    """A, and the lengths Λ of A X W_V = Λ X."""
    A = np.asarray(attention, float)
    moved = A @ X @ W
    lengths = (moved * X).sum(-1)
    away = np.abs(moved - lengths[:, None] * X).max()
    if not (lengths > 0).all() or away > 1e-6 * lengths.max():
        raise TheoryError(f"tokens must be an equilibrium of attention and values: a layer moves them by {away:.3g}.")
    return A, lengths
