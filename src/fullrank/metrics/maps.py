"""One head's attention map as a linear map over tokens: its singular values, and its distance from plain averaging.

`rows` restricts the map to some queries (those for which it is false are taken out); a query that sees no key is
always out. U, the visible-uniform map, spreads each row's own sum evenly over its visible keys. Singular values in
float64, O(T S min(T, S)).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.metrics.attention import shown
from fullrank.metrics.spectrum import singular_values

__all__ = [
    "attention_s1",
    "attention_s2",
    "attention_stable_rank",
    "branch_energy",
    "bulk_excess",
    "contrast_gain",
    "outlier_share",
    "permuted_map",
    "smoothing_gain",
    "uniform_distance",
    "visible_uniform",
]


def visible_uniform(
    A: Float[Tensor, "*batch queries keys"], visible: Bool[Tensor, "*#batch #queries #keys"] | None = None
) -> Float[Tensor, "*batch queries keys"]:
    """U: every row's sum spread evenly over its visible keys (J for full visibility, the running mean for causal)."""
    A, visible = shown(A, visible)
    n = visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, A.sum(-1, keepdim=True) / n, 0)


def _kept(A: Tensor, visible: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The map with rows that are out set to zero, and which rows stay."""
    A, visible = shown(A, visible)
    kept = visible.any(-1)
    if rows is not None:
        kept = kept & rows
    return torch.where(kept[..., None], A, 0), kept


def _nan_if_empty(values: Tensor, kept: Tensor, least: int = 1) -> Tensor:
    return torch.where(kept.sum(-1) >= least, values, torch.nan)


def attention_s1(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Largest singular value of the map.

    Range [0, √T]; at least 1 for a square row-stochastic map; 1 for doubly stochastic maps (identity, uniform), → 2
    for causal averaging, → √T for a pure sink.
    """
    A, kept = _kept(A, visible, rows)
    return _nan_if_empty(singular_values(A)[..., 0], kept)


def attention_s2(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Second singular value: how much survives of what is not the leading average.

    Range [0, √(T/2)]; 1 for the identity, 0 when all rows agree; null 2 √(Y₂ − 1/T) for independent rows of logit
    std below .7, else `permuted_null`. NaN for maps of a single query or key.
    """
    A, kept = _kept(A, visible, rows)
    s = singular_values(A)
    if s.shape[-1] < 2:
        return torch.full_like(s[..., 0], torch.nan)
    return _nan_if_empty(s[..., 1], kept, 2)


def outlier_share(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Energy of the leading direction, s₁² / ‖A‖_F².

    Range [1/min(T, S), 1]: 1 when the map has rank one, 1/T for a permutation. The gap s₁ − s₂ has no scale; this has.
    """
    A, kept = _kept(A, visible, rows)
    energy = singular_values(A).square()
    return _nan_if_empty(energy[..., 0] / energy.sum(-1), kept)


def attention_stable_rank(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """‖A‖_F² / ‖A‖₂², the stable rank of the map (the inverse of `outlier_share`). Range [1, min(T, S)]."""
    return 1 / outlier_share(A, visible, rows)


def uniform_distance(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """‖A − U‖₂: the gain of what attention adds to plain averaging over the visible keys.

    Range [0, √T]; 0 for uniform attention, 1 for the identity.
    """
    A, kept = _kept(A, visible, rows)
    return _nan_if_empty(singular_values(A - visible_uniform(A, visible))[..., 0], kept)


def smoothing_gain(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """‖(I − J)A‖₂, J the mean over the asked queries: by how much differences between tokens can grow at most.

    Range [0, √T]; below 1 the head smooths, and the value bounds the contraction exactly (published constants never
    fall below 1).
    """
    A, kept = _kept(A, visible, rows)
    mean = A.sum(-2, keepdim=True) / kept.sum(-1)[..., None, None]
    return _nan_if_empty(singular_values(torch.where(kept[..., None], A - mean, 0))[..., 0], kept)


def branch_energy(
    A: Float[Tensor, "*batch queries keys"],
    V: Float[Tensor, "*#batch keys width"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """‖(A − U)V‖_F² / ‖AV‖_F²: the share of a head's output that is not the plain average of the visible values.

    Range [0, ∞), usually below 1; 0 for uniform attention; (1−ρ)(Y₂ − 1/T) / (ρ + (1−ρ)Y₂) for values of cosine ρ.
    Near 0, centring the attention would switch the head off. O(T S d).
    """
    A, kept = _kept(A, visible, rows)
    V = V.to(A.dtype)
    centered = ((A - visible_uniform(A, visible)) @ V).square().sum((-2, -1))
    return _nan_if_empty(centered / (A @ V).square().sum((-2, -1)), kept)


def contrast_gain(
    A: Float[Tensor, "*batch queries keys"],
    V: Float[Tensor, "*#batch keys width"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Spread of what comes out over spread of what goes in: √(mean_t ‖o_t − ō‖² / mean_s ‖v_s − v̄‖²), o = AV.

    The gain of the values' non-mean part; that of their mean part is the rows' sum, 1. ō is the mean over the asked
    queries, v̄ over the keys that any query sees. Range [0, √T], at most `smoothing_gain` · √(#keys / #queries); 0 for
    full uniform attention and for pure sinks, 1 for the identity. For values that know nothing of the map √(Y₂ − ‖c‖²),
    c the mean row: with independent rows σ/√T, and a constant over √T for late queries of causal attention. NaN for
    fewer than two queries, and for values that are all equal. O(T S d).
    """
    A, kept = _kept(A, visible, rows)
    V = V.to(A.dtype)
    seen = torch.ones_like(A[..., 0, :], dtype=torch.bool) if visible is None else visible.expand(A.shape).any(-2)
    spread_in = _spread(V.expand(*A.shape[:-2], *V.shape[-2:]), seen)
    return _nan_if_empty((_spread(A @ V, kept) / spread_in).sqrt(), kept, 2)


def _spread(X: Tensor, kept: Tensor) -> Tensor:
    """Mean squared distance of the kept vectors from their mean."""
    n = kept.sum(-1)
    mean = torch.where(kept[..., None], X, 0).sum(-2, keepdim=True) / n[..., None, None]
    return torch.where(kept[..., None], X - mean, 0).square().sum((-2, -1)) / n


def permuted_map(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    *,
    generator: torch.Generator,
) -> Float[Tensor, "*batch queries keys"]:
    """The map with each row's visible entries in random order: the same row statistics, no structure between rows."""
    A, visible = shown(A, visible)
    place = torch.arange(A.shape[-1], device=A.device).expand(A.shape)
    draw = torch.rand(A.shape, generator=generator, device=generator.device).to(A.device)
    ordered = torch.where(visible, place, place + A.shape[-1]).argsort(-1)
    shuffled = torch.where(visible, draw, draw + 2).argsort(-1)
    return torch.zeros_like(A).scatter(-1, ordered, A.gather(-1, shuffled))


def bulk_excess(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
) -> Float[Tensor, "*batch"]:
    """s₂ over its null, the mean s₂ of `draws` maps whose rows' visible entries are permuted.

    Range [0, ∞): 1 is what independent rows of the same sharpness give, well above 1 is structure (position,
    content), below 1 rows that agree. O(draws · T S min(T, S)).

    Args:
        A: the map.
        visible: which keys each query sees.
        rows: which queries.
        draws: how many permuted maps.
        seed: of their own generator.

    Returns:
        The ratio, one per map.
    """
    generator = torch.Generator().manual_seed(seed)
    null = [attention_s2(permuted_map(A, visible, generator=generator), visible, rows) for _ in range(draws)]
    return attention_s2(A, visible, rows) / torch.stack(null).mean(0)
