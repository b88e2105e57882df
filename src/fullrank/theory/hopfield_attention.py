r"""Score-carrying attention (arXiv 2511.20698, RealFormer 2012.11747): what averaging over layers does to logits.

**Assumes** scores $s_\ell$ of layers that are independent and of one spread, as at initialisation.

**Symbols.** `carry` $\alpha'$ of $h_\ell = \alpha' h_{\ell-1} + (1-\alpha')\,s_\ell$, `layer` ℓ from 1, `start` whether
$h_0 = 0$ or $h_1 = s_1$. RealFormer's running sum is $h_\ell = h_{\ell-1} + s_\ell$, its running mean that over ℓ.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Carrying", "Start", "carried_spread", "stationary_spread"]

Array = NDArray[np.float64]

Carrying = Literal["average", "sum", "mean"]
Start = Literal["zero", "first"]


def stationary_spread(carry: ArrayLike) -> Array:
    r"""$\sqrt{(1-\alpha')/(1+\alpha')}$: std of the average over that of one layer's logits, deep in the stack.

    The average is flatter than what it averages: at initialisation score carrying moves attention towards uniform.

    Args:
        carry: α' in [0, 1).

    Returns:
        In (0, 1].
    """
    kept = np.asarray(carry, float)
    return np.asarray(np.sqrt((1 - kept) / (1 + kept)))


def carried_spread(
    layer: ArrayLike, *, how: Carrying = "average", carry: ArrayLike = 0.5, start: Start = "zero"
) -> Array:
    r"""Std of the scores that layer ℓ attends with, over that of one layer's own.

    `average`: with $f = (1-\alpha')/(1+\alpha')$ its variance is $f\,(1-\alpha'^{2\ell})$ from $h_0 = 0$, and
    $\alpha'^{2(\ell-1)} + f\,(1-\alpha'^{2(\ell-1)})$ from $h_1 = s_1$, so that nothing is flattened at first.
    `sum`: √ℓ. `mean`: 1/√ℓ.

    Args:
        layer: ℓ ≥ 1.
        how: what is carried.
        carry: α' in [0, 1), of the average.
        start: of the average.

    Returns:
        Of the broadcast shape.
    """
    depth, kept = np.asarray(layer, float), np.asarray(carry, float)
    if how == "sum":
        return np.asarray(np.sqrt(depth))
    if how == "mean":
        return np.asarray(1 / np.sqrt(depth))
    fresh = (1 - kept) / (1 + kept)  # (1 − α')² / (1 − α'²)
    if start == "zero":
        return np.asarray(np.sqrt(fresh * (1 - kept ** (2 * depth))))
    old = kept ** (2 * (depth - 1))
    return np.asarray(np.sqrt(old + fresh * (1 - old)))
