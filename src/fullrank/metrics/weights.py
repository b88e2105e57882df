"""Numbers of weights: how large they are, how many directions they use, what the circuits of a head do.

A matrix W is (out, in) as torch stores it, y = W x: its rows are the input weights of its outputs. With queries W_Q x
and keys W_K x the logits of a head are xᵀ M x′ with M = W_Qᵀ W_K; what a head writes of a token is H x with
H = W_O W_V. Both are d × d of rank at most d_k, so that their non-zero eigenvalues are those of a d_k × d_k matrix.
Rotary embeddings and biases are no part of either.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.metrics.accumulate import accumulate
from fullrank.metrics.spectral_ranks import ranks
from fullrank.metrics.spectrum import singular_values

__all__ = [
    "condensation",
    "qk_eigenvalue_variance",
    "spectral_norm",
    "value_output_sign",
    "weight_effective_rank",
    "weight_rms",
    "weight_spectrum",
    "weight_stable_rank",
]

_BLOCK = 2048
"""Rows compared with all others at a time."""

_ZERO = 1e-10
"""Eigenvalues below this share of the largest are taken for zeros of a matrix without full rank."""


def weight_rms(W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """√mean w², the standard deviation that an initialisation speaks of; ‖W‖_F over the root of the number of entries.

    Range [0, ∞); null is what the initialisation set, often .02 or 1/√in. O(out in).
    """
    W = accumulate(W).double()
    return W.square().mean((-2, -1)).sqrt()


def condensation(W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """Mean |cos| over pairs of different rows: how far the outputs' input weights lie on one line (Zhou et al. 2022).

    Range [0, 1]; null √(2/(π in)) for independent Gaussian rows; 1 when all rows are parallel or opposite. A row of
    zeros enters no pair; NaN for fewer than two others. Invariant to the order and the length of rows, sign
    included, and to rotations of the input. O(out² in).
    """
    W = accumulate(W)
    norm = torch.linalg.vector_norm(W, dim=-1, keepdim=True)
    U = W / torch.where(norm > 0, norm, 1)
    n = (norm > 0).sum((-2, -1)).double()
    total = torch.zeros_like(n)
    for rows in U.split(_BLOCK, -2):
        total += (rows @ U.mT).abs().sum((-2, -1), dtype=torch.float64)
    own = U.square().sum((-2, -1), dtype=torch.float64)
    mean = ((total - own) / (n * (n - 1))).clamp(min=0, max=1)
    return torch.where(n >= 2, mean, torch.nan)


def weight_spectrum(sigma: Float[Tensor, "*batch values"]) -> dict[str, Tensor]:
    """`spectral_norm`, `weight_stable_rank` and `weight_effective_rank` from one set of singular values.

    Args:
        sigma: in falling order, as `singular_values` gives them.

    Returns:
        Name to value, one per matrix.
    """
    found = ranks(sigma, tokens=sigma.shape[-1], width=sigma.shape[-1], dtype=sigma.dtype)
    return {
        "spectral_norm": sigma[..., 0],
        "weight_stable_rank": found["stable_rank"],
        "weight_effective_rank": found["effective_rank"],
    }


def spectral_norm(W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """σ₁ = ‖W‖₂, the largest factor by which W lengthens a vector.

    Range [0, ∞); null about std·(√out + √in) for independent entries. By way of the smaller Gram matrix in float64,
    O(out in min(out, in)).
    """
    return weight_spectrum(singular_values(W))["spectral_norm"]


def weight_stable_rank(W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """‖W‖_F² / ‖W‖₂².

    Range [1, min(out, in)]; null out·in/(√out + √in)²; 1 when one direction holds all. NaN for zeros. O(out in
    min(out, in)).
    """
    return weight_spectrum(singular_values(W))["weight_stable_rank"]


def weight_effective_rank(W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """Exp H(σ/Σσ) of the singular values of W.

    Range [1, min(out, in)]; null by simulation, .8 of min(out, in) (square) to nearly all of it (one side much longer);
    1 when one direction holds all. NaN for zeros. O(out in min(out, in)).
    """
    return weight_spectrum(singular_values(W))["weight_effective_rank"]


def qk_eigenvalue_variance(
    W_Q: Float[Tensor, "*batch head_width in"], W_K: Float[Tensor, "*batch key_width key_in"]
) -> Float[Tensor, "*batch"]:
    """Variance of the in eigenvalues of W_QK = W_Qᵀ W_K, mean|λ|² − |mean λ|² (Bao et al. 2024).

    All but head_width of them are zero. Small values let attention settle on few tokens without collapse. Range
    [0, ∞); null about std⁴·head_width²/2 for independent entries; without the scale of the logits. NaN where W is
    not finite. O(in head_width² + head_width³).

    Args:
        W_Q: queries of one head are W_Q x.
        W_K: keys of the same head are W_K x.

    Returns:
        One number for each head.

    Raises:
        ShapeError: where the two have different shapes: keys of another width have no common eigenvalues.
    """
    if W_Q.shape != W_K.shape:
        raise ShapeError(
            f"W_Q has shape {tuple(W_Q.shape)} and W_K {tuple(W_K.shape)}; eigenvalues of W_QK need the same shape."
        )
    d = W_Q.shape[-1]
    eigenvalues = _eigenvalues(accumulate(W_K).double() @ accumulate(W_Q).double().mT)
    return (eigenvalues.abs().square().sum(-1) / d - (eigenvalues.sum(-1) / d).abs().square()).clamp(min=0)


def value_output_sign(
    W_V: Float[Tensor, "*batch head_width in"], W_O: Float[Tensor, "*batch out inner"]
) -> Float[Tensor, "*batch"]:
    """Mean sign of the real parts of the non-zero eigenvalues of H = W_O W_V, what a head writes of a token.

    In residual attention without MLP, positive eigenvalues smooth the tokens and negative ones keep them apart
    (Dovonon et al. 2024). Range [−1, 1]; null 0; 1: all positive. NaN where W_O W_V has no eigenvalue but zero, or
    out is not in. Invariant to the scale of either. O(in head_width² + head_width³).

    Args:
        W_V: values of one head (or of all, one below the other) are W_V x.
        W_O: the head (or all of them, side by side) adds W_O v to the stream.

    Returns:
        One number for each head.

    Raises:
        ShapeError: where the two do not lead from the stream back to it.
    """
    if W_V.shape[-2] != W_O.shape[-1] or W_V.shape[-1] != W_O.shape[-2]:
        raise ShapeError(
            f"W_V has shape {tuple(W_V.shape)} and W_O {tuple(W_O.shape)}; W_O W_V must lead from the stream back to "
            "it."
        )
    W_V, W_O = accumulate(W_V).double(), accumulate(W_O).double()
    inner, width = W_V.shape[-2:]
    eigenvalues = _eigenvalues(W_V @ W_O if inner <= width else W_O @ W_V)
    largest = eigenvalues.abs().amax(-1, keepdim=True)
    real = torch.where(eigenvalues.abs() > _ZERO * largest, eigenvalues.real, 0)
    counted = (eigenvalues.abs() > _ZERO * largest).sum(-1)
    mean = real.sign().sum(-1) / counted
    return torch.where((counted > 0) & largest[..., 0].isfinite(), mean, torch.nan)


def _eigenvalues(M: Tensor) -> Tensor:
    finite = M.isfinite().all(-1).all(-1)[..., None]
    found = torch.linalg.eigvals(torch.where(finite[..., None], M, 0))
    return torch.where(finite, found, torch.full_like(found, torch.nan))
