"""What a number is when there is nothing to see: the reference that makes it readable.

`null_value` for states: isotropic Gaussian tokens, independent between tokens, sequences and layers.
`permuted_null` for attention: the same map with the visible entries of every row in random order.
"""

import functools
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import TableError
from fullrank.metrics import attention, batch, channels, geometry, maps, samples, spectral_ranks, tokens

__all__ = ["null_value", "permuted_null"]


def _mean_root_of_beta(a: float, b: float) -> float:
    """E √x for x ~ Beta(a, b)."""
    return math.exp(math.lgamma(a + 0.5) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(a + b + 0.5))


def _mean_rms(n: int) -> float:
    return math.sqrt(2 / n) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))


_Closed = Callable[[int, int, int], float]
_CLOSED: dict[str, _Closed] = {
    "rms": lambda T, d, S: _mean_rms(T * d),
    "similarity": lambda T, d, S: 0.0 if T > 1 else math.nan,
    "similarity_across": lambda T, d, S: 0.0 if S > 1 else math.nan,
    "neighbour_cosine": lambda T, d, S: 0.0,
    "residual": lambda T, d, S: _mean_root_of_beta(d * (T - 1) / 2, d / 2) if T > 1 else math.nan,
    "shared_energy": lambda T, d, S: 1 / (S * T) if S > 1 else math.nan,
    "sequence_energy": lambda T, d, S: (S - 1) / (S * T) if S > 1 else math.nan,
    "token_energy": lambda T, d, S: 1 - 1 / T,
    "distinct_at_dtype": lambda T, d, S: 1.0 if T > 1 else math.nan,
    "identity_distance": lambda T, d, S: _mean_root_of_beta(((T - 1) * d - 1) / 2, 0.5) if T > 1 else math.nan,
    "span_novelty": lambda T, d, S: 1 - T / d if d > T else math.nan,
    "neighbourhood_overlap": lambda T, d, S: 2 / (T - 1) if T > 2 else math.nan,
    "numerical_rank": lambda T, d, S: float(min(T, d)),
    "centered_numerical_rank": lambda T, d, S: float(min(T - 1, d)),
}
"""Exact means: a share of the energy in a subspace is a ratio of dimensions, whatever the draw."""

_ONE_STATE: dict[str, Callable[[Tensor], Tensor]] = {
    "similarity_standardized": batch.similarity_standardized,
    "channel_entropy": channels.channel_entropy,
    "max_to_median": channels.max_to_median,
    "max_abs": channels.max_abs,
    "intrinsic_dimension": geometry.intrinsic_dimension,
    "orthogonality_gap": samples.orthogonality_gap,
    "isometry_gap": samples.isometry_gap,
    **{
        name: getattr(spectral_ranks, name)
        for base in ("stable_rank", "gram_stable_rank", "effective_rank", "spectral_entropy_rank")
        for name in (base, f"centered_{base}")
    },
    **{
        name: getattr(spectral_ranks, name)
        for base in ("participation_ratio", "soft_rank")
        for name in (base, f"centered_{base}")
    },
}
_TWO_STATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"update_share": tokens.update_share}


@functools.lru_cache(maxsize=4096)
def null_value(
    metric: str, *, tokens: int, width: int, sequences: int = 2, draws: int = 8, seed: int = 0
) -> tuple[float, float]:
    """What a metric of token states gives for isotropic Gaussian tokens of unit variance.

    Exact where the mean is known in closed form (standard error 0), else the mean over `draws` simulated batches. A
    centred or anisotropic healthy state lies elsewhere: this is the reference for "no structure at all", not for
    "healthy".

    Args:
        metric: a token, batch or sample metric of `VOCABULARY`.
        tokens: T.
        width: d.
        sequences: how many sequences a batch has.
        draws: how many batches to simulate.
        seed: of their own generator.

    Returns:
        Mean and its standard error.

    Raises:
        TableError: for a metric that is not one of states.
    """
    if metric in _CLOSED:
        return _CLOSED[metric](tokens, width, sequences), 0.0
    if metric not in _ONE_STATE and metric not in _TWO_STATES:
        known = ", ".join(sorted((*_CLOSED, *_ONE_STATE, *_TWO_STATES)))
        raise TableError(f"metric={metric!r} has no null of Gaussian tokens; those that have one: {known}.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        X = torch.randn(sequences, tokens, width, generator=generator)
        if metric in _ONE_STATE:
            values = _ONE_STATE[metric](X)
        else:
            values = _TWO_STATES[metric](X, torch.randn(X.shape, generator=generator))
        found.append(values.double().mean())
    mean, stderr = _mean_and_stderr(torch.stack(found))
    return float(mean), float(stderr) if math.isfinite(mean) else 0.0


_OF_A_MAP: dict[str, Callable[..., Tensor]] = {
    name: getattr(module, name)
    for module, names in (
        (maps, ("attention_s1", "attention_s2", "outlier_share", "attention_stable_rank")),
        (maps, ("uniform_distance", "smoothing_gain")),
        (attention, ("entropy", "normalized_entropy", "effective_keys", "inverse_participation")),
        (attention, ("selectivity", "sink_mass")),
    )
    for name in names
}
_WITH_VALUES: dict[str, Callable[..., Tensor]] = {
    "branch_energy": maps.branch_energy,
    "contrast_gain": maps.contrast_gain,
}


def permuted_null(
    metric: str,
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    *,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
    V: Float[Tensor, "*#batch keys width"] | None = None,
    draws: int = 8,
    seed: int = 0,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """What a metric gives for the map with the visible entries of every row shuffled.

    Each row keeps its entropy, its sharpness and its mask; what rows have in common is lost. Numbers of single rows
    (`entropy` and its kin) are their own null.

    Args:
        metric: a metric of one attention map.
        A: the map.
        visible: which keys each query sees.
        rows: which queries the metric is taken over.
        V: values, for `branch_energy` and `contrast_gain`.
        draws: how many shuffled maps.
        seed: of their own generator.

    Returns:
        Mean and its standard error (NaN for a single draw), one per map.

    Raises:
        TableError: for a metric that is not one of a map, or one of maps and values without V.
    """
    generator = torch.Generator().manual_seed(seed)
    if metric in _WITH_VALUES and V is not None:
        of_values = _WITH_VALUES[metric]
        found = [of_values(maps.permuted_map(A, visible, generator=generator), V, visible, rows) for _ in range(draws)]
    elif metric in _OF_A_MAP:
        of = _OF_A_MAP[metric]
        found = [of(maps.permuted_map(A, visible, generator=generator), visible, rows) for _ in range(draws)]
    else:
        known = ", ".join([*(f"{name} (with V=)" for name in _WITH_VALUES), *sorted(_OF_A_MAP)])
        raise TableError(f"metric={metric!r} has no permuted null; those that have one: {known}.")
    return _mean_and_stderr(torch.stack(found))


def _mean_and_stderr(found: Tensor) -> tuple[Tensor, Tensor]:
    draws = found.shape[0]
    mean = found.mean(0)
    if draws < 2:
        return mean, torch.full_like(mean, torch.nan)
    return mean, found.std(0) / math.sqrt(draws)
