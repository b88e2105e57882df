"""The tokens of a sequence as a cloud of points: its dimension, and whether neighbours stay neighbours.

Distances are Euclidean, in float64 (near neighbours differ in digits that float32 loses), by blocks of query
tokens: no T × T matrix is kept. With `points` given, only that many query tokens are drawn, each against all
tokens: say `exact=False` there.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.metrics.accumulate import real_tokens

__all__ = ["Neighbours", "drawn_tokens", "intrinsic_dimension", "nearest_neighbours", "neighbourhood_overlap"]

_BLOCK = 1 << 19
"""Distances held at a time."""

_TOKENS = 2048
"""Tokens of which copies are made at a time."""


class Neighbours(NamedTuple):
    """The k nearest other real tokens of each query token, nearest first; infinity and −1 where there are fewer."""

    distances: Float[Tensor, "*batch queries k"]
    indices: Int[Tensor, "*batch queries k"]


def nearest_neighbours(
    X: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None,
    k: int,
    rows: Int[Tensor, "queries"] | None = None,
) -> Neighbours:
    """The k nearest other tokens of every token (itself and padding left out); ties in no particular order. O(T² d).

    Args:
        X: token vectors.
        mask: which tokens are real.
        k: how many neighbours.
        rows: only these tokens as queries; all by default.

    Returns:
        Distances and indices.
    """
    X, real = real_tokens(X, mask)
    X = _centred(X, real)
    tokens = X.shape[-2]
    if rows is None:
        rows = torch.arange(tokens, device=X.device)
    found = min(k, tokens)
    key = torch.arange(tokens, device=X.device)
    size = torch.cat([block.square().sum(-1) for block in X.split(_TOKENS, -2)], -1)
    lead = max(math.prod(X.shape[:-2]), 1)
    distances, indices = [], []
    for some in rows.split(max(_BLOCK // (tokens * lead), 1)):
        apart = size[..., some, None] + size[..., None, :] - 2 * X[..., some, :] @ X.mT
        hidden = (some[:, None] == key) | ~real[..., None, :]
        near = apart.clamp(min=0).masked_fill(hidden, torch.inf).topk(found, dim=-1, largest=False)
        distances.append(near.values.sqrt())
        indices.append(near.indices.masked_fill(near.values.isinf(), -1))
    missing = (0, k - found)
    return Neighbours(
        torch.nn.functional.pad(torch.cat(distances, -2), missing, value=torch.inf),
        torch.nn.functional.pad(torch.cat(indices, -2), missing, value=-1),
    )


def _centred(X: Tensor, real: Tensor) -> Tensor:
    """The tokens minus their mean (refined once, as in `mean_token`) in float64, with one copy of them in memory."""
    centred = X.to(torch.float64, copy=True)
    n = real.sum(-1)[..., None, None].double()
    x_bar = centred.sum(-2, keepdim=True) / n
    rest = torch.zeros_like(x_bar)
    for block, kept in zip(centred.split(_TOKENS, -2), real.split(_TOKENS, -1), strict=True):
        rest += torch.where(kept[..., None], block - x_bar, 0).sum(-2, keepdim=True)
    return centred.sub_(x_bar + rest / n).masked_fill_(~real[..., None], 0)


def intrinsic_dimension(
    X: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
    *,
    scale: int = 2,
    points: int | None = None,
    seed: int = 0,
    neighbours: Neighbours | None = None,
) -> Float[Tensor, "*batch"]:
    """Dimension of the cloud of tokens from ratios of neighbour distances, after exact duplicates have been removed.

    GRIDE (Denti et al. 2022): with n₂ = `scale`, n₁ = n₂/2 and μ = r_{n₂}/r_{n₁}, the maximum of Σ log [d (μ^d −
    1)^{n₂−n₁−1} / μ^{d(n₂−1)+1}] over d. Scale 2 is TwoNN, d = N / Σ log μ; larger scales look further than noise.
    Range (0, ∞); biased low in high dimension (true 10 gives 8.4 at N = 1000); null: `null_value`. NaN with fewer
    than scale + 1 different tokens. Invariant to token order, rotation and scale. O(T² d).

    Args:
        X: token vectors.
        mask: which tokens are real.
        scale: n₂, a power of two from 2 on.
        points: how many query tokens to draw; all by default.
        seed: of that draw.
        neighbours: at least `scale` of every token, where they are at hand and no tokens are drawn.

    Returns:
        The dimension, one per sequence, in float64.

    Raises:
        BatchError: for a scale that is not a power of two.
    """
    if scale < 2 or scale & (scale - 1):
        raise BatchError(f"scale={scale} is not a power of two from 2 on.")
    X, real = real_tokens(X, mask)
    clouds, reals = X.reshape(-1, *X.shape[-2:]), real.reshape(-1, X.shape[-2])
    known = None if neighbours is None else neighbours.distances.reshape(len(clouds), *neighbours.distances.shape[-2:])
    found = []
    for index, (cloud, kept) in enumerate(zip(clouds, reals, strict=True)):
        near = None if known is None else known[index][kept]
        found.append(_dimension(cloud[kept], scale, points, seed, near))
    return torch.stack([*found, X.new_zeros((), dtype=torch.float64)])[:-1].reshape(X.shape[:-2])


def _dimension(tokens: Tensor, scale: int, points: int | None, seed: int, r: Tensor | None) -> Tensor:
    cloud: Tensor = torch.unique(tokens, dim=0)
    N = cloud.shape[0]
    if scale + 1 > N or not bool(cloud.isfinite().all()):
        return cloud.new_full((), torch.nan, dtype=torch.float64)
    if r is None or len(tokens) > N:  # a token that stands there twice is its own neighbour
        r = nearest_neighbours(cloud, None, scale, drawn_tokens(N, points, seed, cloud.device)).distances
    log_mu = (r[:, scale - 1] / r[:, scale // 2 - 1]).log()
    if scale == 2:
        return log_mu.numel() / log_mu.sum()
    between = scale - scale // 2 - 1
    low = log_mu.new_tensor(math.log(1e-3))
    high = log_mu.new_tensor(math.log(1e6))
    for _ in range(60):  # the score falls in d: bisection on log d, to the last bit
        d = ((low + high) / 2).exp()
        pull = torch.where(log_mu > 0, log_mu / -torch.expm1(-d * log_mu), 1 / d)
        score = log_mu.numel() / d + between * pull.sum() - (scale - 1) * log_mu.sum()
        low, high = torch.where(score > 0, d.log(), low), torch.where(score > 0, high, d.log())
    return torch.where(log_mu.sum() > 0, ((low + high) / 2).exp(), torch.nan)


def neighbourhood_overlap(
    X: Float[Tensor, "*batch tokens width"],
    X_previous: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
    *,
    k: int = 2,
    points: int | None = None,
    seed: int = 0,
    neighbours: tuple[Neighbours, Neighbours] | None = None,
) -> Float[Tensor, "*batch"]:
    """Share of a token's k nearest neighbours that it keeps from one state to the next, mean over tokens.

    mean_t |N_k^ℓ(t) ∩ N_k^{ℓ−1}(t)| / k (Viswanathan et al. 2025, whose published curves have k = 2). Range [0, 1];
    null k/(T − 1) for unrelated states; 1 where a block keeps the neighbourhoods. NaN with T ≤ k. Invariant to
    token order, rotation and scale. O(T² d).

    Args:
        X: states after a block.
        X_previous: states before it.
        mask: which tokens are real.
        k: how many neighbours.
        points: how many query tokens to draw (the same in every sequence); all by default.
        seed: of that draw.
        neighbours: the k nearest in X and in X_previous of the tokens drawn, where they are at hand.

    Returns:
        The share, one per sequence, in float64.
    """
    _, real = real_tokens(X, mask)
    rows = drawn_tokens(real.shape[-1], points, seed, X.device)
    now, before = neighbours or (nearest_neighbours(state, mask, k, rows) for state in (X, X_previous))
    kept = (now.indices[..., :, None] == before.indices[..., None, :]).any(-1).sum(-1) / k
    counted = real[..., rows]
    share = torch.where(counted, kept, 0).sum(-1).double() / counted.sum(-1)
    return torch.where(real.sum(-1) > k, share, torch.nan)


def drawn_tokens(tokens: int, points: int | None, seed: int, device: torch.device) -> Int[Tensor, "points"]:
    """The tokens that are looked at where `points` of them are drawn: all if there are no more, in rising order.

    Args:
        tokens: how many there are.
        points: how many are drawn; all for None.
        seed: of the draw.
        device: where the indices are wanted.

    Returns:
        Their indices.
    """
    if points is None or points >= tokens:
        return torch.arange(tokens, device=device)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return order[:points].sort().values.to(device)
