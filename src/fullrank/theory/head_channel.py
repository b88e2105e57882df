r"""Head-channel non-identifiability (arXiv 2604.23681): what the sum over heads leaves open, and what norms keep.

**Assumes** $y = \sum_h o_h W_O^h$ of $H$ heads of width $d_k$, seen whole or through a linear readout
$B \in \mathbb R^{d\times d_k}$; for the norm $\mathrm{LN}(X) = D\,XP\,\mathrm{diag}(\gamma) + \mathbf 1\beta^\top$ with
$P = I - \mathbf 1\mathbf 1^\top/d$ and $D$ positive.

**Symbols.** $n$ `tokens`, $H$ `heads`, $d_k$ `head_width`, $d$ `width`, `readout` the directions that are seen.
Only ranks relative to the norm's bias are kept by it exactly: that of $\mathrm{LN}(X) - \mathbf 1\beta^\top$ is that of
$XP$. Affine dimensions are not kept, whatever the paper's abstract says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ambiguous_dimensions", "gate_overhead", "skip_keeps_rank"]

Array = NDArray[np.float64]


def ambiguous_dimensions(
    tokens: ArrayLike, *, heads: ArrayLike, head_width: ArrayLike, width: ArrayLike, readout: ArrayLike | None = None
) -> Array:
    r"""Dimension of the head outputs that the sum does not tell apart, for generic $W_O$: $n\,(Hd_k - r)$.

    $r = \min(Hd_k, d, m)$ for a readout of m directions. Seen whole, a square invertible $W_O$ leaves nothing open;
    $n(H-1)d_k$ is what an observer of $d_k$ directions cannot tell.

    Args:
        tokens: n.
        heads: H.
        head_width: d_k.
        width: d.
        readout: m; by default all of d.

    Returns:
        How many.
    """
    together = np.asarray(heads, float) * np.asarray(head_width, float)
    seen = np.asarray(width, float) if readout is None else np.minimum(width, np.asarray(readout, float))
    return np.asarray(np.asarray(tokens, float) * (together - np.minimum(together, seen)))


def gate_overhead(*, heads: ArrayLike, width: ArrayLike, biases: bool = False) -> Array:
    r"""Parameters of a gate for each token and head, $dH$, over those of the output projection, $d^2$: $H/d = 1/d_k$.

    Args:
        heads: H.
        width: d.
        biases: whether both have them.

    Returns:
        The ratio.
    """
    count, d = np.asarray(heads, float), np.asarray(width, float)
    return np.asarray((d * count + count) / (d * d + d) if biases else count / d)


def skip_keeps_rank(attention: ArrayLike, weight: ArrayLike) -> float:
    r"""How far $X \mapsto X + AXW$ is from losing rank: $\min_{ij} |1 + \lambda_i(A)\,\lambda_j(W)|$.

    The map is linear with matrix $I + W^\top \otimes A$, singular only where some product of eigenvalues is −1, which
    no generic pair meets: exact rank is kept, and says nothing, since the stable rank falls to one all the same.

    Args:
        attention: A, square.
        weight: W, square.

    Returns:
        The smallest modulus of an eigenvalue of the map.
    """
    of_attention, of_weight = (np.linalg.eigvals(np.asarray(one, float)) for one in (attention, weight))
    return float(np.abs(1 + np.multiply.outer(of_attention, of_weight)).min())
