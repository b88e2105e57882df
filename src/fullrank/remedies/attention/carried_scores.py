r"""Scores that are carried from layer to layer, as one attention call on concatenated queries and keys.

A carried score is $h_\ell = f_\ell h_{\ell-1} + w_\ell s_\ell$ with $s_\ell$ the layer's own scores, so
$h_\ell = \sum_{j \le \ell} c_j s_j$, $c_j = w_j \prod_{i=j+1}^{\ell} f_i$. Since $s_j = \sigma_j Q_j K_j^\top$,

$$h_\ell = \sigma \, [\tfrac{c_1 \sigma_1}{\sigma} Q_1, \dots, \tfrac{c_\ell \sigma_\ell}{\sigma} Q_\ell]\,
[K_1, \dots, K_\ell]^\top$$

exactly: any kernel that never writes its scores computes softmax(h) V in memory linear in the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Step", "coefficients", "concatenated", "left_out", "needed", "steps"]

Step = tuple[float, float]
"""(f, w) of h ← f h + w s."""


def steps(
    layers: int,
    rule: Literal["average", "sum", "mean"],
    *,
    keeps: float = 0.5,
    start: Literal["zero", "first"] = "zero",
) -> tuple[Step, ...]:
    r"""The rule of every layer.

    - `average` (Hopfield): $h_\ell = \alpha' h_{\ell-1} + (1-\alpha') s_\ell$;
    - `sum` (RealFormer): $h_\ell = h_{\ell-1} + s_\ell$;
    - `mean` (RealFormer, of its deepest model): $h_\ell = \frac{1}{\ell} \sum_{j \le \ell} s_j$.

    Args:
        layers: how many, at least 1.
        rule: which.
        keeps: $\alpha'$ of the average, in [0, 1].
        start: of the average: $h_0 = 0$ (`zero`), so that $h_1 = (1-\alpha') s_1$, or $h_1 = s_1$ (`first`).

    Returns:
        (f, w) of layers 1 to L; f of the first is 0.
    """
    if rule == "average":
        first = 1.0 if start == "first" else 1 - keeps
        return ((0.0, first), *((keeps, 1 - keeps) for _ in range(layers - 1)))
    if rule == "sum":
        return ((0.0, 1.0), *((1.0, 1.0) for _ in range(layers - 1)))
    return tuple(((layer - 1) / layer, 1 / layer) for layer in range(1, layers + 1))


def coefficients(rule: Sequence[Step]) -> tuple[float, ...]:
    r"""What each layer's own scores count in those of the last: $c_j = w_j \prod_{i>j} f_i$.

    Args:
        rule: (f, w) of layers 1 to l.

    Returns:
        c₁ … c_l.
    """
    counts: list[float] = []
    for f, w in rule:
        counts = [f * c for c in counts] + [w]
    return tuple(counts)


def left_out(counts: Sequence[float], keep: int | None) -> float:
    r"""How much of the weights belongs to the layers that are cut off: $\epsilon = \sum_{j \le \ell-m} |c_j|$.

    Where every score is at most S in absolute value, the sum of the kept differs from the whole by at most ε S.
    For the average it is at most $\alpha'^m$.

    Args:
        counts: c₁ … c_l.
        keep: m, how many of the latest layers are kept; None for all.

    Returns:
        ε, 0 where nothing is cut off.
    """
    return 0.0 if keep is None else math.fsum(abs(c) for c in counts[: max(len(counts) - keep, 0)])


def needed(counts: Sequence[float], tolerance: float) -> int:
    """The least number of latest layers with which no more than `tolerance` of the weights is left out.

    Args:
        counts: c₁ … c_l.
        tolerance: ε, at least 0.

    Returns:
        m, at least 1.
    """
    return next(m for m in range(1, len(counts) + 1) if left_out(counts, m) <= tolerance)


def concatenated(
    queries: Sequence[Tensor], keys: Sequence[Tensor], weights: Sequence[float], scale: float
) -> tuple[Tensor, Tensor]:
    r"""One pair of queries and keys whose scores are a weighted sum: $scale \cdot Q K^\top = \sum_j c_j Q_j K_j^\top$.

    The weights are put on the queries alone: keys are copied as they are, of which several queries' heads may share
    one, and weights that are powers of two round nothing. Terms of weight 0 are left out. Memory O(T Σd_j).

    Args:
        queries: (…, heads, queries, d_j) each.
        keys: (…, key heads, keys, d_j) each, as many key heads in all.
        weights: c_j, with each layer's own scale in it.
        scale: by which the kernel multiplies the product.

    Returns:
        (…, heads, queries, Σd_j) and (…, key heads, keys, Σd_j).
    """
    terms = [(q, k, c / scale) for q, k, c in zip(queries, keys, weights, strict=True) if c != 0]
    terms = terms or [(queries[-1], keys[-1], 0.0)]
    scaled = [q if c == 1 else q * c for q, _, c in terms]
    if len(terms) == 1:
        return scaled[0], terms[0][1]
    return torch.cat(scaled, -1), torch.cat([k for _, k, _ in terms], -1)
