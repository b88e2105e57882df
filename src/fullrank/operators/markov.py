"""Random Markov ensembles: matrices with random non-negative entries whose rows are normalised.

The null of attention in random-matrix theory: A_ts = D_ts / Σ_r D_tr with independent D of mean 1 and variance σ². For
full matrices of size T: s₁ → 1, s₂ ≃ 2σ/√T, |λ₂| ≃ σ/√T, ‖A‖_F² → 1 + σ² (Chafaï 0709.4678; Bordenave, Caputo, Chafaï
0808.1502).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.errors import ShapeError

__all__ = ["exponential_markov", "gaussian_logit_markov", "lognormal_markov"]


def lognormal_markov(
    tokens: int,
    *,
    generator: torch.Generator,
    lead: tuple[int, ...] = (),
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*lead tokens tokens"]:
    """Rows of log-normal entries of mean 1 and variance 1: the softmax of N(−½ ln 2, ln 2) logits. σ = 1.

    Args:
        tokens: T.
        generator: where randomness comes from; the matrix lives on its device.
        lead: leading dimensions, for several matrices.
        causal: keep only the lower triangle before rows are normalised.
        dtype: of the entries.

    Returns:
        Row-stochastic matrices.
    """
    return gaussian_logit_markov(
        tokens, math.sqrt(math.log(2)), generator=generator, lead=lead, causal=causal, dtype=dtype
    )


def exponential_markov(
    tokens: int,
    *,
    generator: torch.Generator,
    lead: tuple[int, ...] = (),
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*lead tokens tokens"]:
    """Rows of exponential entries: uniform on the simplex (the Dirichlet ensemble). Mean 1, variance 1, σ = 1.

    Args:
        tokens: T.
        generator: where randomness comes from; the matrix lives on its device.
        lead: leading dimensions, for several matrices.
        causal: keep only the lower triangle before rows are normalised.
        dtype: of the entries.

    Returns:
        Row-stochastic matrices.
    """
    return _normalised(_drawn(torch.Tensor.exponential_, tokens, lead, generator, dtype), causal)


def gaussian_logit_markov(
    tokens: int,
    std: float,
    *,
    generator: torch.Generator,
    lead: tuple[int, ...] = (),
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*lead tokens tokens"]:
    """The softmax of independent N(0, std²) logits: σ² = exp(std²) − 1.

    Args:
        tokens: T.
        std: of the logits; 0 gives uniform attention.
        generator: where randomness comes from; the matrix lives on its device.
        lead: leading dimensions, for several matrices.
        causal: keep only the lower triangle before rows are normalised.
        dtype: of the entries.

    Returns:
        Row-stochastic matrices.

    Raises:
        ShapeError: std is negative or not finite.
    """
    if not (std >= 0 and math.isfinite(std)):
        raise ShapeError(f"std={std} is not a standard deviation; expected a finite number ≥ 0.")
    logits = _drawn(torch.Tensor.normal_, tokens, lead, generator, dtype).mul_(std)
    # a shift per row cancels in the normalisation and keeps exp within range
    return _normalised(logits.sub_(logits.amax(-1, keepdim=True)).exp_(), causal)


def _drawn(
    fill: Callable[..., Tensor],
    tokens: int,
    lead: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    if tokens < 1:
        raise ShapeError(f"tokens={tokens}; expected at least 1.")
    return fill(torch.empty(*lead, tokens, tokens, dtype=dtype, device=generator.device), generator=generator)


def _normalised(D: Tensor, causal: bool) -> Tensor:
    if causal:
        D = D.tril_()
    return D.div_(D.sum(-1, keepdim=True))
