r"""What rotary positions leave of the agreement of two keys."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BASE", "rotary_agreement"]

Array = NDArray[np.float64]

BASE: Final = 1e4
"""Of the wavelengths, as in RoFormer (arXiv 2104.09864)."""

_PLANES = 48


def rotary_agreement(keys: ArrayLike, *, base: float = BASE) -> Array:
    r"""$\kappa = \mathbb E_{s,s'}\operatorname{mean}_i\cos\theta_i(s-s')$ over n neighbouring keys.

    Two equal keys at positions s and s′ differ by a rotation, so that a logit of the direction that all tokens share
    varies over the row: its variance is $q(q-\kappa p)$ in place of $q(q-p)$. In one plane κ is Fejér's kernel
    $[\sin(n\theta/2)/(n\sin(\theta/2))]^2$; $\theta_i = \mathrm{base}^{-2i/d_h}$, i as if continuous. Derived here.

    Args:
        keys: n ≥ 1.
        base: of the wavelengths.

    Returns:
        κ in [0, 1], of the shape of `keys`: 1 for one key, falling like $1 - \log n/\log$ base.
    """
    n = np.asarray(keys, dtype=np.float64)[..., None]
    half = 0.5 * base ** -((np.arange(_PLANES) + 0.5) / _PLANES)
    return np.asarray(np.square(np.sin(n * half) / (n * np.sin(half))).mean(-1))
