r"""DeepScaleLM's initialisation (arXiv 2403.09635): standard deviations that keep the stream's moments at one.

For a stack $X \leftarrow \lambda X + \beta F(X)$ with $\lambda^2 + \beta^2 = 1$ around attention and around the MLP,
before any training. Every branch is given variance 1, so that the stream keeps it at any depth; attention shrinks its
input by what the tokens do not share, so that its weights follow the correlation, tracked from layer to layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.errors import TheoryError
from fullrank.theory.deepscalelm import dropout_correlation, feed_forward_correlation
from fullrank.theory.deepscalelm_attention import attention_covariance, attention_variance

__all__ = ["FIRST_CORRELATION", "UnitMoments", "unit_moments", "unit_moments_of"]

Array = NDArray[np.float64]

FIRST_CORRELATION: Final = 0.221
"""r₀ that the paper's code starts from: between embedded tokens of text, with repetitions."""


@dataclass(frozen=True)
class UnitMoments:
    """Standard deviations of the entries of weights, and multipliers, by layer.

    Attributes:
        qk: of W_Q and W_K, (depth,).
        vo: of W_V and W_O, (depth,).
        ffn: of both weights of the MLP, (depth,).
        embedding: of each table of embeddings.
        skip: λ, past attention and past the MLP.
        branch: β, of attention and of the MLP.
        correlation: r of what attention reads in each layer and after the last, (depth + 1,).
    """

    qk: Array
    vo: Array
    ffn: Array
    embedding: float
    skip: float
    branch: float
    correlation: Array


def unit_moments(
    *,
    depth: int,
    width: int,
    mlp_width: int | None = None,
    attention_width: int | None = None,
    dropout: float = 0.0,
    correlation: float = FIRST_CORRELATION,
    branch_square: float | None = None,
    tokens: float = math.inf,
    embeddings: int = 3,
) -> UnitMoments:
    r"""Standard deviations that keep variances at one through a stack of ReLU blocks.

    $\sigma_{qk} = d^{-1/2}$; $\sigma_{ffn}^4 = 2(1-p)/(d\,d_{ff})$, which is $\sqrt{(1-p)/2}/d$ squared for
    $d_{ff} = 4d$; $\sigma_{v,o}^4 = (1-p)/(d^2 c)$ with $c = r$ in the paper, and `attention_variance` at s = 1, about
    $r + (1-r)e^{1-r}/T$, where T is given; embeddings $\sqrt{(1-p)/3}$. Between them
    $r \leftarrow \lambda^2r + \beta^2r_F$, $r_F$ = 1 − p behind attention (times covariance over variance where T is
    given), `feed_forward_correlation` behind the MLP.

    Args:
        depth: blocks.
        width: d.
        mlp_width: d_ff; by default 4d.
        attention_width: of all heads' values together, in place of one d of σ_v,o; by default d.
        dropout: p, behind embeddings and both branches.
        correlation: r₀ > 0, between tokens before the first block.
        branch_square: β²; by default 1/depth, close to the paper's .005 for 192 blocks.
        tokens: T; infinite as in the paper.
        embeddings: tables that are added up: 3 in the paper (words, positions, segments).

    Returns:
        The standard deviations.

    Raises:
        TheoryError: for what leaves no variance to keep.
    """
    if depth < 1:
        raise TheoryError(f"depth={depth}: unit moments are of one block or more.")
    if not 0 < correlation <= 1:
        raise TheoryError(f"correlation={correlation}: tokens must share something, more than 0 and at most 1.")
    if not 0 <= dropout < 1:
        raise TheoryError(f"dropout={dropout} is no probability below 1.")
    beta2 = 1 / depth if branch_square is None else branch_square
    if not 0 < beta2 <= 1:
        raise TheoryError(f"branch_square={beta2}: λ² + β² = 1 takes more than 0 and at most 1.")
    hidden, inner, keep = mlp_width or 4 * width, attention_width or width, 1 - dropout
    fluctuating = width if tokens < math.inf else math.inf
    laws = (attention_variance, attention_covariance)
    r, tracked, gains = correlation, [correlation], []
    for _ in range(depth):
        variance, covariance = (float(law(r, tokens=tokens, logit_std=1.0, width=fluctuating)) for law in laws)
        gains.append(keep / variance)
        written = float(dropout_correlation(covariance / variance, dropout=dropout))
        r = (1 - beta2) * r + beta2 * written
        r = (1 - beta2) * r + beta2 * float(feed_forward_correlation(r, dropout=dropout))
        tracked.append(r)
    return UnitMoments(
        qk=np.full(depth, width**-0.5),
        vo=(np.array(gains) / (width * inner)) ** 0.25,
        ffn=np.full(depth, (2 * keep / (width * hidden)) ** 0.25),
        embedding=math.sqrt(keep / embeddings),
        skip=math.sqrt(1 - beta2),
        branch=math.sqrt(beta2),
        correlation=np.array(tracked),
    )


def unit_moments_of(architecture: Architecture, *, branch_square: float | None = None) -> UnitMoments:
    """The same for an architecture's sizes, context, correlation and dropout (r₀ = .221 where it knows none).

    Args:
        architecture: whose depth, widths, context, dropout and correlation are taken.
        branch_square: β²; by default 1/depth.

    Returns:
        The standard deviations.

    Raises:
        TheoryError: for an MLP that is not one hidden layer of ReLU, which the constants are for.
    """
    if architecture.gated or architecture.activation != "relu" or not architecture.mlp_width:
        gate = "gated " if architecture.gated else ""
        raise TheoryError(
            f"unit moments are of an MLP of one hidden layer of ReLU; this one is {gate}{architecture.activation}, "
            f"{architecture.mlp_width} wide."
        )
    return unit_moments(
        depth=architecture.depth,
        width=architecture.width,
        mlp_width=architecture.mlp_width,
        attention_width=architecture.heads * int(architecture.head_width or 1),
        dropout=architecture.dropout,
        correlation=architecture.correlation if architecture.correlation > 0 else FIRST_CORRELATION,
        branch_square=branch_square,
        tokens=architecture.visible,
    )
