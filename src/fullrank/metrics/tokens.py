"""The tokens of one sequence: their size, how much they agree, and what a block changes.

X ∈ ℝ^{T×d} holds T token vectors of width d; padded tokens count for nothing. Every function takes leading batch axes
and answers NaN where the number is not defined (too few real tokens, no energy at all).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import balanced, mean_token, real_tokens

__all__ = ["identity_distance", "neighbour_cosine", "residual", "rms", "similarity", "unit_tokens", "update_share"]


def rms(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Root mean square of the entries: √(Σ x² / (T d)).

    Range [0, ∞), in the units of X; null 1 for entries of unit variance. Invariant to token order and rotation. O(T
    d).
    """
    X, real = real_tokens(X, mask)
    X, scale = balanced(X)
    energy = X.square().sum((-2, -1))
    return scale[..., 0, 0] * (energy / (real.sum(-1) * X.shape[-1])).sqrt()


def unit_tokens(X: Float[Tensor, "*batch tokens width"]) -> Float[Tensor, "*batch tokens width"]:
    """Every token at unit length; a token that is exactly zero has no direction and stays zero."""
    X, _ = balanced(X, dim=-1)
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return X / torch.where(norm > 0, norm, 1)


def similarity(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """ρ: mean cosine over the pairs of different tokens of one sequence.

    (‖Σ_t u_t‖² − T) / (T (T − 1)) with u_t = x_t/‖x_t‖. Tokens that are exactly zero have no direction and enter no
    pair. Range [−1/(T−1), 1]; null 0 ± √(2/d)/T; 1 when all tokens point the same way. Invariant to token order,
    rotation, and the length of each token. O(T d), no T × T matrix.
    """
    X, _ = real_tokens(X, mask)
    U = unit_tokens(X)
    T = (U != 0).any(-1).sum(-1).to(U.dtype)
    together = U.sum(-2).square().sum(-1)
    rho = (together - U.square().sum((-2, -1))) / (T * (T - 1))
    rho = rho.clamp(max=1)  # rounding only: a mean of cosines cannot exceed 1
    return torch.where(T >= 2, rho, torch.nan)


def residual(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Share of the signal that is not the token mean: ‖X − 1x̄ᵀ‖_F / ‖X‖_F.

    Range [0, 1]; null √(1 − 1/T); 0 when all tokens are one. For tokens of equal length it is √((1 − 1/T)(1 − ρ)).
    Invariant to token order, rotation and scale. Below `floor(dtype)` it is rounding. O(T d).
    """
    X, real = real_tokens(X, mask)
    X, _ = balanced(X)
    centered = torch.where(real[..., None], X - mean_token(X, real), 0)
    share = torch.linalg.vector_norm(centered, dim=(-2, -1)) / torch.linalg.vector_norm(X, dim=(-2, -1))
    return torch.where(real.sum(-1) >= 2, share.clamp(max=1), torch.nan)


def update_share(
    X: Float[Tensor, "*batch tokens width"],
    X_previous: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How much a block changes the stream: ‖X_ℓ − X_{ℓ−1}‖_F / ‖X_{ℓ−1}‖_F.

    Range [0, ∞); 0 for a block that does nothing; null √2 for two unrelated states of equal size. Invariant to token
    order, rotation and scale of both. O(T d).
    """
    X, _ = real_tokens(X, mask)
    X_previous, _ = real_tokens(X_previous, mask)
    X, X_previous, _ = balanced(X, X_previous)
    change = torch.linalg.vector_norm(X - X_previous, dim=(-2, -1))
    size = torch.linalg.vector_norm(X_previous, dim=(-2, -1))
    return torch.divide(change, size)


def neighbour_cosine(
    X: Float[Tensor, "*batch tokens width"],
    X_previous: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cosine between the states before and after a block, each read as one long vector.

    ⟨X_ℓ, X_{ℓ−1}⟩_F / (‖X_ℓ‖_F ‖X_{ℓ−1}‖_F): the Frobenius cosine, in which large tokens weigh more; not a mean of
    cosines per token. Range [−1, 1]; null 0 ± 1/√(T d); 1 for a block that changes nothing but the size. Invariant
    to token order, rotation and scale. O(T d).
    """
    X, _ = balanced(real_tokens(X, mask)[0])
    X_previous, _ = balanced(real_tokens(X_previous, mask)[0])
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X_previous = X_previous / torch.linalg.vector_norm(X_previous, dim=(-2, -1), keepdim=True)
    return (X * X_previous).sum((-2, -1)).clamp(-1, 1)


def identity_distance(
    X: Float[Tensor, "*batch tokens width"],
    X_0: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How far blocks are from handing their input on: the sine of the angle between what is particular to the tokens.

    √(1 − c²) with c the Frobenius cosine of X − 1x̄ᵀ and X_0 − 1x̄_0ᵀ. 0 for a network that does nothing, or only scales
    its tokens alike and adds the same to all: such a network keeps every profile of the signal and computes nothing.
    Range [0, 1]; null √(1 − 1/((T − 1) d)) ≈ 1 for unrelated states. Invariant to token order, rotation and scale.
    Undefined (NaN) where tokens do not differ. O(T d).
    """
    halves: list[Tensor] = []
    for state in (X, X_0):
        Y, real = real_tokens(state, mask)
        Y, _ = balanced(Y)
        count = real.sum(-1)[..., None, None]
        Y = torch.where(real[..., None], Y - Y.sum(-2, keepdim=True) / count, 0.0)
        halves.append(Y / torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True))
    Y, Y_0 = halves
    along = (Y * Y_0).sum((-2, -1), keepdim=True)
    across: Tensor = torch.linalg.vector_norm(Y - along * Y_0, dim=(-2, -1))  # √(1 − c²) would round at 1e-4
    return across.clamp(max=1)
