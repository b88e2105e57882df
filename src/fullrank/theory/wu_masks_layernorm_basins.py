r"""Where attention with a norm ends, by sampling starts (arXiv 2405.18781): equilibria of full rank are seldom found.

**Assumes and symbols** as in `wu_masks_layernorm_equilibria`: $x_i^+ = y_i/\|y_i\|$, $Y = A X W_V$.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.theory.wu_masks_layernorm_equilibria import normalised_layer, unit_rows

__all__ = ["Share", "basin", "limits", "rank_shares"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Of sampled starts.

    Attributes:
        value: share of them.
        stderr: its standard error, of a binomial.
        samples: how many.
    """

    value: float
    stderr: float
    samples: int


def limits(starts: ArrayLike, attention: ArrayLike, values: ArrayLike, *, layers: int = 500) -> Array:
    """Tokens after many layers, for many starts at once.

    Args:
        starts: of shape (samples, N, d).
        attention: A.
        values: W_V.
        layers: how many.

    Returns:
        Of the shape of `starts`.
    """
    X = unit_rows(starts)
    for _ in range(layers):
        X = normalised_layer(X, attention, values)
    return X


def basin(
    tokens: ArrayLike,
    attention: ArrayLike,
    values: ArrayLike,
    *,
    perturbation: float | None = None,
    samples: int = 1000,
    seed: int,
    layers: int = 500,
) -> Share:
    """Share of starts that end at an equilibrium.

    Args:
        tokens: X, the equilibrium.
        attention: A.
        values: W_V.
        perturbation: standard deviation of the noise that is added to every entry of X for a start; None for starts
            anywhere on the sphere.
        samples: starts.
        seed: of the noise.
        layers: after how many layers it is looked at.

    Returns:
        Those whose tokens all lie within 1e-6 of X.
    """
    X = unit_rows(tokens)
    noise = np.random.default_rng(seed).standard_normal((samples, *X.shape))
    starts = noise if perturbation is None else X + perturbation * noise
    away = np.linalg.norm(limits(starts, attention, values, layers=layers) - X, axis=-1).max(-1)
    return _share(away < 1e-6)


def rank_shares(
    count: int, attention: ArrayLike, values: ArrayLike, *, samples: int = 1000, seed: int, layers: int = 500
) -> tuple[Share, ...]:
    """Where starts anywhere on the sphere end, by the rank of the tokens that they end with.

    Args:
        count: N.
        attention: A.
        values: W_V, of shape (d, d).
        samples: starts.
        seed: of the starts.
        layers: after how many layers the rank is taken, of singular values above 1e-6 of the first.

    Returns:
        Of ranks 1 … min(N, d).
    """
    width = len(np.asarray(values))
    starts = np.random.default_rng(seed).standard_normal((samples, count, width))
    sigma = np.linalg.svd(limits(starts, attention, values, layers=layers), compute_uv=False)
    rank = (sigma > 1e-6 * sigma[:, :1]).sum(-1)
    return tuple(_share(rank == one) for one in range(1, min(count, width) + 1))


def _share(hits: NDArray[np.bool_]) -> Share:
    value = float(hits.mean())
    return Share(value, float((value * (1 - value) / hits.size) ** 0.5), hits.size)
