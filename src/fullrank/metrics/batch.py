"""Several sequences together: one cosine has three causes, and this is how they are told apart.

What all sequences share (a bias, rogue dimensions) is harmless, what one sequence shares is often wanted, and only
tokens merging within what is left is collapse.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.accumulate import balanced, mean_token, real_tokens
from fullrank.metrics.tokens import similarity, unit_tokens

__all__ = [
    "EnergyShares",
    "energy_shares",
    "sequence_energy",
    "shared_energy",
    "similarity_across",
    "similarity_standardized",
    "token_energy",
]


class EnergyShares(NamedTuple):
    """Shares of ‖X‖² that add to 1."""

    shared: Float[Tensor, ""]
    sequence: Float[Tensor, ""]
    token: Float[Tensor, ""]


def energy_shares(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> EnergyShares:
    """Splits the energy of a batch: Σ‖x_st‖² = N‖m‖² + Σ_s n_s‖x̄_s − m‖² + Σ_st‖x_st − x̄_s‖².

    m is the mean of all N real tokens, x̄_s the mean of the n_s real tokens of sequence s (so long sequences weigh
    more). The three terms over the left side are `shared`, `sequence` and `token`; they add to 1 exactly. Null for
    S sequences of independent tokens: 1/N, (S − 1)/N, 1 − S/N. With fewer than two sequences the first two cannot
    be told apart: both NaN. Invariant to token and sequence order, rotation and scale. O(N d).
    """
    X, real = real_tokens(X, mask)
    X, _ = balanced(X, dim=(-3, -2, -1))
    n = real.sum(-1).to(X.dtype)
    kept = n > 0
    x_bar = torch.where(kept[:, None, None], mean_token(X, real), 0)
    m = (n[:, None] * x_bar[:, 0]).sum(0) / n.sum()
    shared = n.sum() * m.square().sum()
    sequence = (n * (x_bar[:, 0] - m).square().sum(-1)).sum()
    token = torch.where(real[..., None], X - x_bar, 0).square().sum()
    total = shared + sequence + token
    split = torch.where(kept.sum() >= 2, total, torch.nan)
    return EnergyShares(shared / split, sequence / split, token / total)


def shared_energy(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> Float[Tensor, ""]:
    """Share of ‖X‖² in the mean over the whole batch, N‖m‖²/‖X‖². See `energy_shares`."""
    return energy_shares(X, mask).shared


def sequence_energy(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> Float[Tensor, ""]:
    """Share of ‖X‖² in the sequences' means beyond the batch mean, Σ_s n_s‖x̄_s − m‖²/‖X‖². See `energy_shares`."""
    return energy_shares(X, mask).sequence


def token_energy(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> Float[Tensor, ""]:
    """Share of ‖X‖² that is particular to a token, Σ_st‖x_st − x̄_s‖²/‖X‖². See `energy_shares`."""
    return energy_shares(X, mask).token


def similarity_across(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean cosine over pairs of tokens of different sequences: (‖Σ u‖² − Σ_s‖Σ_t u_st‖²) / (N² − Σ_s n_s²).

    As large as `similarity`: the agreement is common to all inputs; much smaller: it belongs to the sequence. Range
    [−1, 1]; null 0; NaN with fewer than two sequences. Invariant to token order, rotation and token length. O(N d).
    """
    X, _ = real_tokens(X, mask)
    U = unit_tokens(X)
    n = (U != 0).any(-1).sum(-1).to(U.dtype)
    together = U.sum(-2)
    pairs = n.sum().square() - n.square().sum()
    rho = (together.sum(0).square().sum() - together.square().sum()) / pairs
    return torch.where(pairs > 0, rho.clamp(-1, 1), torch.nan)


def similarity_standardized(
    X: Float[Tensor, "sequences tokens width"], mask: Bool[Tensor, "sequences tokens"] | None = None
) -> Float[Tensor, "sequences"]:
    """`similarity` within each sequence after every feature has been shifted and scaled to mean 0 and variance 1.

    Mean and variance are taken over all real tokens of all sequences, so that a shared bias and rogue dimensions no
    longer count. Features that do not vary (standard deviation within rounding of their size) are left out. Range
    [−1/(T−1), 1]; null ≈ −1/N. Invariant to token order and to the scale of each feature, not to rotation. O(N d).
    """
    eps = torch.finfo(X.dtype).eps
    X, real = real_tokens(X, mask)
    X, _ = balanced(X, dim=(-3, -2, -1))
    flat, flags = X.flatten(0, 1), real.flatten(0, 1)
    centered = torch.where(flags[:, None], flat - mean_token(flat, flags), 0)
    N = flags.sum().to(X.dtype)
    variance = centered.square().sum(0) / N
    size = flat.square().sum(0) / N
    varies = variance > size * eps**2
    Z = torch.where(varies, centered / variance.sqrt(), 0)
    return similarity(Z.reshape(X.shape), real)
