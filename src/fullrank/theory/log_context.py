r"""How logits must grow with the context for attention to stay sharp.

Chen, Lin, Polyanskiy and Rigollet (arXiv 2510.05554): with logits $\gamma\log n$ times the cosine of query and key
($Q = K = V = I$, tokens on a simplex of cosine ρ) there is a critical $\gamma_c = 1/(1-\rho)$. Below it all tokens
merge, above it attention tends to the identity. This is the law of deterministic cosines, linear in log n; random
logits need a standard deviation of $\sqrt{2\log n}$ (`random_energy`), which is another law.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError

__all__ = ["critical_logit_scale", "critical_multiplier", "rescaled_for_context"]

Array = NDArray[np.float64]


def critical_multiplier(rho: ArrayLike) -> Array:
    r"""$\gamma_c = 1/(1-\rho)$, of log n times the cosine of query and key.

    Args:
        rho: mean cosine between different tokens, in [−1, 1].

    Returns:
        γ_c in [1/2, ∞]; ∞ where all tokens agree.

    Raises:
        TheoryError: for a cosine beyond [−1, 1].
    """
    rho = np.asarray(rho, dtype=np.float64)
    if not (np.abs(rho) <= 1).all():
        raise TheoryError(f"rho={rho} must be cosines between -1 and 1.")
    with np.errstate(divide="ignore"):
        return np.asarray(1 / (1 - rho))


def critical_logit_scale(rho: ArrayLike, context: ArrayLike) -> Array:
    r"""$\beta_n = \gamma_c\log n$: what a cosine must be multiplied by at least for a token to see itself first.

    Args:
        rho: mean cosine between different tokens.
        context: n, ≥ 2.

    Returns:
        The logit of cosine 1, of the broadcast shape.

    Raises:
        TheoryError: for a cosine beyond [−1, 1] or a context below 2.
    """
    return np.asarray(critical_multiplier(rho) * np.log(_context(context)))


def rescaled_for_context(context: ArrayLike, new_context: ArrayLike, *, logits: str = "cosines") -> Array:
    r"""Factor on logits that keeps a head where it is in its phase as the context is extended.

    $\log n'/\log n$ where logits are multiples of cosines (arXiv 2510.05554), $\sqrt{\log n'/\log n}$ where they are
    random (the random energy model, arXiv 2505.24333).

    Args:
        context: n, ≥ 2.
        new_context: n′, ≥ 2.
        logits: `cosines` or `random`.

    Returns:
        The factor, of the broadcast shape.

    Raises:
        TheoryError: for a context below 2, or other logits.
    """
    ratio = np.log(_context(new_context)) / np.log(_context(context))
    match logits:
        case "cosines":
            return np.asarray(ratio)
        case "random":
            return np.asarray(np.sqrt(ratio))
    raise TheoryError(f"logits={logits!r} is not one of cosines, random.")


def _context(context: ArrayLike) -> Array:
    n = np.asarray(context, dtype=np.float64)
    if not (n >= 2).all():
        raise TheoryError(f"context={context!r} must be 2 tokens or more.")
    return n
