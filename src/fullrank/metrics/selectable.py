"""Keys that no query can choose."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["unselectable_keys"]

_DIRECTIONS = 512
_MARGIN = 1e-6


def unselectable_keys(
    K: Float[Tensor, "*batch keys width"], mask: Bool[Tensor, "*batch keys"] | None = None
) -> Float[Tensor, "*batch"]:
    """Share of keys that no query can attend to most: k_i lies in the convex hull of the others (Brody et al. 2023).

    k_i is selectable iff some q has (k_j − k_i)·q ≤ −1 for every j ≠ i, a linear programme (HiGHS). Keys that win
    for one of some hundred tried queries are selectable without one. Take the keys of a head after W_K, where
    LayerNorm's guarantee no longer holds. Range [0, 1]; null near 0 for d_k ≥ 12 and a few dozen keys, .4 to .7 for
    d_k = 3; NaN for fewer than two keys. Invariant to key order, rotation, scale, shift. Up to n programmes of n ×
    d_k: draw some keys of a long context.
    """
    *batch, keys, width = K.shape
    flat = K.detach().double().cpu().reshape(-1, keys, width)
    reals = [slice(None)] * len(flat) if mask is None else list(mask.cpu().reshape(-1, keys))
    shares = [_share(cloud[real]) for cloud, real in zip(flat, reals, strict=True)]
    return torch.tensor(shares, dtype=torch.float64, device=K.device).reshape(batch)


def _share(K: Tensor) -> float:
    if K.shape[0] < 2 or not bool(K.isfinite().all()):
        return float("nan")
    K = K - K.mean(0)
    K = K / K.abs().amax().clamp(min=torch.finfo(K.dtype).tiny)
    won = _winners(K)
    lost = [i for i in range(K.shape[0]) if not won[i] and not _selectable(K, i)]
    return len(lost) / K.shape[0]


def _winners(K: Tensor) -> Tensor:
    """Keys ahead of all others, by a margin, for one of the tried queries: the keys, whitened keys, random ones."""
    whitened = K @ torch.linalg.pinv(K.mT @ K, hermitian=True)
    random = torch.randn(_DIRECTIONS, K.shape[1], dtype=K.dtype, generator=torch.Generator().manual_seed(0))
    scores = K @ torch.cat([K, whitened, random]).mT  # (keys, queries)
    first, second = scores.topk(2, dim=0).values
    clear = first - second > _MARGIN * scores.abs().amax(0)
    won = torch.zeros(K.shape[0], dtype=torch.bool)
    won[scores.argmax(0)[clear]] = True
    return won


def _selectable(K: Tensor, i: int) -> bool:
    from scipy.optimize import linprog

    others = torch.cat([K[:i], K[i + 1 :]])
    found = linprog(
        torch.zeros(K.shape[1]).numpy(),
        A_ub=(others - K[i]).numpy(),
        b_ub=-torch.ones(len(others)).numpy(),
        bounds=(None, None),
        method="highs",
    )
    return bool(found.status == 0)
