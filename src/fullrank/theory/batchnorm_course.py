r"""Daneshmand, Joudaki and Bach (arXiv 2106.03970): a batch's orthogonality gap over batch-normalised linear layers.

**Assumes** blocks $X^+ = \mathrm{BN}(X W_1W_2)$ without skips and without attention, whose batch norm uses the mean and
the variance of the batch it is given. The batch's samples are the architecture's `context` vectors.

**Symbols.** $n$ `samples` of mean cosine $\rho_0$, $d$ `width`, $m$ `hidden`. Centring over the batch takes their
common direction in the first layer, whatever $\rho_0$: what is left lies in n − 1 dimensions, so that the gap cannot
fall below $1/\sqrt{n(n-1)}$, and the isometry gap is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption
from fullrank.theory.batchnorm import orthogonality_contraction, orthogonality_gap_square
from fullrank.theory.theory import theory

__all__ = ["BATCHNORM", "orthogonality_course"]

Array = NDArray[np.float64]


def orthogonality_course(
    layers: ArrayLike, *, width: ArrayLike, samples: ArrayLike, correlation: ArrayLike = 0.0, hidden: ArrayLike = np.inf
) -> Array:
    r"""Orthogonality gap after `layers` centred batch norms.

    $V_0^2 = \tfrac{n-1}n\rho_0^2 + v$ with $v = \tfrac{n+1}{nd}$ of vectors drawn at random; after that
    $V_l^2 = \tfrac1{n(n-1)} + \kappa^{2l}v' + (1 - \kappa^{2l})V_\infty^2$ with κ and $V_\infty$ those of n − 1 samples
    (`orthogonality_gap_square`).

    Args:
        layers: l ≥ 0.
        width: d.
        samples: n ≥ 3.
        correlation: ρ₀.
        hidden: m, rows between the two weights of a layer.

    Returns:
        V_l, of the broadcast shape.
    """
    depth, d, n, rho = (np.asarray(one, float) for one in (layers, width, samples, correlation))
    own = n - 1
    plateau = orthogonality_gap_square(width=d, samples=own, hidden=hidden)
    forgotten = orthogonality_contraction(own) ** (2 * depth)
    drawn = (own + 2) * (own - 1) / (own**2 * d)  # of centred Gaussian vectors, all directions alike
    later = 1 / (n * own) + forgotten * drawn + (1 - forgotten) * plateau
    first = own / n * rho**2 + (1 - rho) ** 2 * (n + 2) * own / (n**2 * d)
    return np.asarray(np.sqrt(np.where(depth == 0, first, later)))


@theory(
    "batchnorm",
    title="batch norms orthogonalise (arXiv 2106.03970)",
    assumes=(
        Assumption(
            "every block ends in a batch norm",
            lambda one: float(one.norm == "batchnorm" and one.placement == "post"),
            "its norm is {norm}, {placement}",
        ),
        Assumption(
            "a block is an MLP alone",
            lambda one: float(one.attention_branch == 0 and one.mlp_width != 0 and one.mlp_branch != 0),
            "it has attention",
        ),
        Assumption(
            "no skip leads past the MLP",
            lambda one: float(one.mlp_skip == 0),
            "a skip of strength {mlp_skip} leads past its MLP",
        ),
        Assumption(
            "the MLP is linear",
            lambda one: float(one.activation == "identity" and not one.gated),
            "its MLP has {activation} units, or a gate",
        ),
        Assumption(
            "there are 3 samples or more, and far fewer than features",
            lambda one: float(one.context >= 3) * max(0.0, 1 - one.context / one.width),
            "its batch of {context} vectors is too small, or not below its width of {width}",
        ),
    ),
    gives=("orthogonality_gap",),
)
def BATCHNORM(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows over the samples of a batch; an infinite isometry gap is left out."""
    one = architecture
    course = orthogonality_course(
        np.arange(one.depth + 1),
        width=one.width,
        samples=one.context,
        correlation=one.correlation,
        hidden=float(one.mlp_width or 0),
    )
    return [
        Row(
            stack=one.stack,
            layer=layer,
            site="stream",
            part="out",
            metric="orthogonality_gap",
            value=value,
            scope="samples",
            n=None,
            source="theory:batchnorm",
        )
        for layer, value in enumerate(course.tolist())
    ]
