"""Seven numbers that people have called "rank", each under its own name, of X and of X − 1x̄ᵀ.

A shared direction (a mean token of cosine ρ > 0) drives every uncentred rank towards 1 even in healthy models, so
each comes in two versions that belong together. All are functions of the singular values alone: an observer
factorises once (`both_singular_values`) and calls `ranks`. All are invariant to token order, rotation and scale.
NaN for a matrix that is zero or has no real token; `numerical_rank` and `soft_rank` of a zero matrix are 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.spectrum import both_singular_values, singular_values

__all__ = [
    "centered_effective_rank",
    "centered_gram_stable_rank",
    "centered_numerical_rank",
    "centered_participation_ratio",
    "centered_soft_rank",
    "centered_spectral_entropy_rank",
    "centered_stable_rank",
    "effective_rank",
    "gram_stable_rank",
    "numerical_rank",
    "participation_ratio",
    "ranks",
    "soft_rank",
    "spectral_entropy_rank",
    "stable_rank",
]


def ranks(
    sigma: Float[Tensor, "*batch values"],
    *,
    tokens: Tensor | int,
    width: int,
    dtype: torch.dtype,
    tau: float = 0.5,
    largest: Float[Tensor, "*batch"] | None = None,
) -> dict[str, Tensor]:
    """Every rank from one set of singular values.

    Args:
        sigma: singular values in falling order, padded with zeros.
        tokens: T, how many tokens are real, one number or one per matrix.
        width: d.
        dtype: in which the tokens came; its ε sets the threshold of `numerical_rank`.
        tau: threshold of `soft_rank`.
        largest: for centred values, σ₁ of the uncentred states: tokens are rounded relative to their own size, so that
            is what the threshold of `numerical_rank` is relative to. By default the first of `sigma`.

    Returns:
        Name (without `centered_`) to value, one per matrix.
    """
    tokens = torch.as_tensor(tokens, device=sigma.device).expand(sigma.shape[:-1])
    return {
        "stable_rank": _stable_rank(sigma),
        "gram_stable_rank": _stable_rank(sigma.square()),
        "effective_rank": _entropy_rank(sigma),
        "spectral_entropy_rank": _entropy_rank(sigma.square()),
        "participation_ratio": _participation_ratio(sigma),
        "numerical_rank": _numerical_rank(sigma, sigma[..., 0] if largest is None else largest, tokens, width, dtype),
        "soft_rank": _soft_rank(sigma, tokens, width, tau),
    }


def _unit(sigma: Tensor) -> Tensor:
    """Largest value 1, so that squares and fourth powers neither overflow nor vanish; NaN for a zero matrix."""
    return sigma / sigma[..., :1]


def _stable_rank(sigma: Tensor) -> Tensor:
    return _unit(sigma).square().sum(-1)


def _entropy_rank(weights: Tensor) -> Tensor:
    share = weights / weights.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def _participation_ratio(sigma: Tensor) -> Tensor:
    energy = _unit(sigma).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def _numerical_rank(sigma: Tensor, largest: Tensor, tokens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    relative = tokens.clamp(min=width) * torch.finfo(dtype).eps
    rank = _count(sigma, sigma > (largest * relative)[..., None], tokens)
    return torch.where(relative < 1, rank, torch.nan)


def _soft_rank(sigma: Tensor, tokens: Tensor, width: int, tau: float) -> Tensor:
    energy = torch.nan_to_num(_unit(sigma)).square()
    enough = energy >= tau * energy.sum(-1, keepdim=True) / width
    return _count(sigma, enough & (sigma > 0), tokens)


def _count(sigma: Tensor, counted: Tensor, tokens: Tensor) -> Tensor:
    known = (tokens > 0) & ~sigma[..., 0].isnan()
    return torch.where(known, counted.sum(-1).to(sigma.dtype), torch.nan)


def _of(X: Tensor, mask: Tensor | None, name: str, *, centered: bool, tau: float = 0.5) -> Tensor:
    tokens = X.shape[-2] if mask is None else mask.sum(-1)
    largest = None
    if centered and name == "numerical_rank":
        uncentered, sigma = both_singular_values(X, mask)
        largest = uncentered[..., 0]
    else:
        sigma = singular_values(X, mask, centered=centered)
    return ranks(sigma, tokens=tokens, width=X.shape[-1], dtype=X.dtype, tau=tau, largest=largest)[name]


def stable_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """‖X‖_F² / ‖X‖₂² = Σσ² / σ₁².

    Range [1, min(T, d)]; null T d / (√T + √d)² for large sizes; 1 when one direction holds all energy.
    """
    return _of(X, mask, "stable_rank", centered=False)


def centered_stable_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`stable_rank` of X − 1x̄ᵀ."""
    return _of(X, mask, "stable_rank", centered=True)


def gram_stable_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """The stable rank of XXᵀ: Σσ⁴ / σ₁⁴ (what the code of Mind the Gap plots).

    Range [1, min(T, d)]; null T d (T + d) / (√T + √d)⁴; → 1 + (1−ρ)²(1 + T/d)/(ρ²T) for tokens of mean cosine ρ > 0.
    """
    return _of(X, mask, "gram_stable_rank", centered=False)


def centered_gram_stable_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`gram_stable_rank` of X − 1x̄ᵀ."""
    return _of(X, mask, "gram_stable_rank", centered=True)


def effective_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Exp H(σ / Σσ) (Roy and Vetterli 2007; RankMe).

    Range [1, min(T, d)]; null by simulation, .8 of min(T, d) (T = d) to nearly all of it (one much larger).
    """
    return _of(X, mask, "effective_rank", centered=False)


def centered_effective_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`effective_rank` of X − 1x̄ᵀ."""
    return _of(X, mask, "effective_rank", centered=True)


def spectral_entropy_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Exp H(σ² / Σσ²).

    Range [1, min(T, d)]; null by simulation, .6 of min(T, d) (T = d) to nearly all of it (one much larger).
    """
    return _of(X, mask, "spectral_entropy_rank", centered=False)


def centered_spectral_entropy_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`spectral_entropy_rank` of X − 1x̄ᵀ."""
    return _of(X, mask, "spectral_entropy_rank", centered=True)


def participation_ratio(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """(Σσ²)² / Σσ⁴ (under batch normalisation Daneshmand's r(H)).

    Range [1, min(T, d)]; null ≈ T d / (T + d + 1).
    """
    return _of(X, mask, "participation_ratio", centered=False)


def centered_participation_ratio(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`participation_ratio` of X − 1x̄ᵀ."""
    return _of(X, mask, "participation_ratio", centered=True)


def numerical_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """#{σ > σ₁ · max(T, d) · ε}, ε that of the dtype X came in.

    Range [0, min(T, d)]; null min(T, d). It stays full through a collapse: never the sole ground of a verdict. NaN
    where max(T, d) ε ≥ 1 (bfloat16 from 128 channels on, float16 from 1024): no value could pass.
    """
    return _of(X, mask, "numerical_rank", centered=False)


def centered_numerical_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """`numerical_rank` of X − 1x̄ᵀ: the affine rank, dimension of the affine hull of the tokens.

    The threshold is relative to σ₁ of the uncentred X, because tokens are rounded relative to their own size: what
    is left of tokens that agree up to rounding has rank 0. Null min(T − 1, d).
    """
    return _of(X, mask, "numerical_rank", centered=True)


def soft_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None, *, tau: float = 0.5
) -> Float[Tensor, "*batch"]:
    """rank_τ: #{σ² ≥ τ‖X‖_F² / d} (Daneshmand et al. 2020, where batch normalisation makes ‖X‖_F² = d T).

    Range [0, min(T, d)]; null by simulation; τ = ½ by default. A healthy anisotropic state counts its main directions.
    """
    return _of(X, mask, "soft_rank", centered=False, tau=tau)


def centered_soft_rank(
    X: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None, *, tau: float = 0.5
) -> Float[Tensor, "*batch"]:
    """`soft_rank` of X − 1x̄ᵀ."""
    return _of(X, mask, "soft_rank", centered=True, tau=tau)
