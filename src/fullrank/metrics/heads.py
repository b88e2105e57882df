"""The heads of one layer together: do they say the same, and can their shares of the sum be told apart."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.metrics.accumulate import accumulate, balanced

__all__ = [
    "Conditioning",
    "HeadAmbiguity",
    "conditioning",
    "head_ambiguity",
    "head_similarity",
    "nearest_head",
    "nearest_head_similarity",
]


def head_similarity(
    contributions: Float[Tensor, "*batch heads tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Mean cosine over pairs of different heads of what they write, O_h = A_h V_h W_O^h, each read as one long vector.

    Range [−1/(H−1), 1]; null 0 ± √(2/(T d))/H; 1 when all heads write the same up to size. A head that writes
    nothing enters no pair; NaN for fewer than two heads. Invariant to token order, rotation and the size of each
    head. O(H T d).
    """
    Y = accumulate(contributions)
    if mask is not None:
        Y = torch.where(mask[..., None, :, None], Y, 0)
    Y, _ = balanced(Y)
    norm = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    Y = Y / torch.where(norm > 0, norm, 1)
    H = (norm > 0).sum((-3, -2, -1)).to(Y.dtype)
    together = Y.sum(-3).square().sum((-2, -1))
    mean = (together - Y.square().sum((-3, -2, -1))) / (H * (H - 1))
    return torch.where(H >= 2, mean.clamp(max=1), torch.nan)


def nearest_head_similarity(
    contributions: Float[Tensor, "*batch heads tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch heads"]:
    """Of each head the largest cosine of what it writes, O_h = A_h V_h W_O^h as one long vector, with another's.

    Where it is 1 for two heads one of them can be dropped and the other's W_O^h multiplied, and the layer writes what
    it wrote: of a pair of cosine c that loses √(1 − c²) of the dropped head's share. Range [−1, 1]; null about
    √(2 log H/(T d)) for independent heads, up to √(2 log H/d) where all tokens are read alike. NaN for a head that
    writes nothing or has no other beside it. Invariant to token order, rotation and the size of each head. O(H² T d).
    """
    return _cosines(contributions, mask).amax(-1).nan_to_num(neginf=torch.nan)


def nearest_head(
    contributions: Float[Tensor, "*batch heads tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch heads"]:
    """Index of the head of `nearest_head_similarity`. NaN where there is none. O(H² T d)."""
    cosines = _cosines(contributions, mask)
    return torch.where(cosines.amax(-1).isfinite(), cosines.argmax(-1).to(cosines.dtype), torch.nan)


def _cosines(contributions: Tensor, mask: Tensor | None) -> Tensor:
    """Between heads; −∞ on the diagonal and for heads that write nothing."""
    Y = accumulate(contributions)
    if mask is not None:
        Y = torch.where(mask[..., None, :, None], Y, 0)
    Y = balanced(Y)[0].flatten(-2)
    norm = torch.linalg.vector_norm(Y, dim=-1, keepdim=True)
    Y = Y / torch.where(norm > 0, norm, 1)
    writes = (norm > 0).squeeze(-1)
    pairs = writes[..., :, None] & writes[..., None, :] & ~torch.eye(Y.shape[-2], dtype=torch.bool, device=Y.device)
    return (Y @ Y.mT).clamp(-1, 1).masked_fill(~pairs, -torch.inf)


class Conditioning(NamedTuple):
    """What a linear readout of the layer's output can tell of the heads' outputs.

    Attributes:
        rank: rank_τ(W_O B), how many directions of the heads' outputs it sees.
        condition_number: σ₁/σ_min of W_O (∞ when it is singular).
    """

    rank: Int[Tensor, ""]
    condition_number: Float[Tensor, ""]


class HeadAmbiguity(NamedTuple):
    """How far the heads' shares of the sum Σ_h O_h W_O^h are undetermined by it.

    Attributes:
        degrees_of_freedom: dimension of the changes of the heads' outputs that the readout does not see.
        condition_number: σ₁/σ_min of W_O (∞ when it is singular). principal_angles: (heads, heads, min(d_k, d))
        angles in radians between the row spaces of the blocks W_O^h, rising.
    """

    degrees_of_freedom: Int[Tensor, ""]
    condition_number: Float[Tensor, ""]
    principal_angles: Float[Tensor, "heads heads angles"]


def head_ambiguity(
    W_O: Float[Tensor, "inner width"],
    *,
    heads: int,
    tokens: int,
    readout: Float[Tensor, "width seen"] | None = None,
    tau: float | None = None,
) -> HeadAmbiguity:
    """Ambiguous degrees of freedom n (H d_k − rank_τ(W_O B)) of n tokens for a linear readout B of the layer's output.

    With the full readout (B = I) and a square invertible W_O there are none: the heads' outputs follow from the
    sum. An observer with d_k outputs leaves n (H − 1) d_k. Angles near 0 between two heads' row spaces make an
    attribution ill-conditioned. O(d³).

    Args:
        W_O: output projection, rows ordered by head: y = [O_1 … O_H] W_O (the transpose of a torch Linear's weight).
        heads: H.
        tokens: n.
        readout: B; None for the full output.
        tau: singular values above tau·σ₁ count towards the rank; by default max(shape)·ε of the dtype of W_O.

    Returns:
        Degrees of freedom, condition number, principal angles.

    Raises:
        BatchError: where the rows of W_O cannot be split among the heads.
    """
    inner, width = W_O.shape
    if heads < 1 or inner % heads:
        raise BatchError(
            f"heads={heads} does not divide the {inner} rows of W_O; pass W_O with one block of rows per head."
        )
    tau = _threshold(W_O) if tau is None else tau
    rank, condition_number = conditioning(W_O, readout=readout, tau=tau)
    blocks = W_O.double().reshape(heads, inner // heads, width)
    _, sigma, basis = torch.linalg.svd(blocks, full_matrices=False)
    basis = torch.where((sigma > tau * sigma[:, :1])[..., None], basis, 0)
    cosines = torch.linalg.svdvals(basis[:, None] @ basis[None].mT).clamp(max=1)
    return HeadAmbiguity(tokens * (inner - rank), condition_number, cosines.arccos())


def conditioning(
    W_O: Float[Tensor, "inner width"], *, readout: Float[Tensor, "width seen"] | None = None, tau: float | None = None
) -> Conditioning:
    """Rank and condition number behind `head_ambiguity`, without the angles between heads.

    One singular value decomposition, O(inner² width), and one of W_O B where there is a readout.

    Args:
        W_O: output projection, rows ordered by head.
        readout: B; None for the full output.
        tau: singular values above tau·σ₁ count towards the rank; by default max(shape)·ε of the dtype of W_O.

    Returns:
        Rank, condition number.
    """
    tau = _threshold(W_O) if tau is None else tau
    inner, width = W_O.shape
    W = W_O.double()
    sigma = torch.linalg.svdvals(W)
    seen = sigma if readout is None else torch.linalg.svdvals(W @ readout.double())
    smallest = sigma[-1] if inner <= width else torch.zeros_like(sigma[0])
    return Conditioning((seen > tau * seen[0]).sum(), sigma[0] / smallest)


def _threshold(W: Tensor) -> float:
    return max(W.shape) * torch.finfo(W.dtype).eps
