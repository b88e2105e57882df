"""One head's attention map, row by row: the dense definitions that the streaming summary must reproduce.

A ∈ ℝ^{T×S} holds a distribution over S keys for each of T queries. `visible` says which keys a query may see (None:
all), `rows` which queries a mean is taken over (None: all); a query that sees no key enters nothing. What stands in
A at hidden keys is not looked at. All are means over queries unless the docstring says otherwise, and NaN where no
query is left.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.metrics.accumulate import accumulate
from fullrank.metrics.rows import (
    effective_keys_rows,
    log_context_gauge_rows,
    max_over_rows,
    mean_over_rows,
    normalized_entropy_rows,
    selectivity_from_summary,
)

__all__ = [
    "column_mean",
    "effective_keys",
    "entropy",
    "entropy_rows",
    "inverse_participation",
    "log_context_gauge",
    "logit_std",
    "max_logit",
    "normalized_entropy",
    "selectivity",
    "shown",
    "sink_mass",
    "sink_position",
]


def shown(
    A: Float[Tensor, "*batch queries keys"], visible: Bool[Tensor, "*#batch #queries #keys"] | None
) -> tuple[Float[Tensor, "*batch queries keys"], Bool[Tensor, "*batch queries keys"]]:
    """The map in the precision of the arithmetic, zero at hidden keys, and the visibility of every entry.

    Args:
        A: a map, or its logits.
        visible: which keys each query sees; None when it sees all.

    Returns:
        The map and its visibility, of one shape.

    Raises:
        BatchError: where the visibility does not fit the map.
    """
    A = accumulate(A)
    if visible is None:
        return A, torch.ones((), dtype=torch.bool, device=A.device).expand(A.shape)
    try:
        visible = visible.expand(A.shape)
    except RuntimeError:
        raise BatchError(f"visible has shape {tuple(visible.shape)}; it must broadcast to {tuple(A.shape)}.") from None
    return torch.where(visible, A, 0), visible


def _defined(values: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible.any(-1), values, torch.nan)


def entropy_rows(
    A: Float[Tensor, "*batch queries keys"], visible: Bool[Tensor, "*#batch #queries #keys"] | None = None
) -> Float[Tensor, "*batch queries"]:
    """H_t = −Σ_s A_ts log A_ts in nats, one per query; NaN for a query that sees no key."""
    A, visible = shown(A, visible)
    return _defined(-torch.xlogy(A, A).sum(-1), visible)


def entropy(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean row entropy, mean_t −Σ_s A_ts log A_ts, in nats.

    Range [0, log S]. Log of the number of visible keys: the row averages everything; 0: it copies one key. A low
    value alone is no collapse (a pointer head); read it with `selectivity`. Invariant to the order of keys. O(T S).
    """
    return mean_over_rows(entropy_rows(A, visible), rows)


def normalized_entropy(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean of H_t / log n_t, n_t the number of keys visible to query t; queries that see one key are left out.

    Range [0, 1]: 1 uniform over what is visible, 0 one key. O(T S).
    """
    _, seen = shown(A, visible)
    return mean_over_rows(normalized_entropy_rows(entropy_rows(A, visible), seen.sum(-1)), rows)


def effective_keys(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean over queries of exp H_t (the mean of the exponentials, not the exponential of the mean).

    Range [1, S]; the number of keys over which a uniform row of the same entropy would spread. O(T S).
    """
    return mean_over_rows(effective_keys_rows(entropy_rows(A, visible)), rows)


def inverse_participation(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Y₂ = mean_t Σ_s A_ts². Range [1/S, 1]: 1/n_t for uniform rows, 1 for one-hot ones. O(T S)."""
    A, visible = shown(A, visible)
    return mean_over_rows(_defined(A.square().sum(-1), visible), rows)


def column_mean(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch keys"]:
    """c_s: what key s receives from the average query (of the asked ones that see any key)."""
    A, visible = shown(A, visible)
    kept = visible.any(-1)
    if rows is not None:
        kept = kept & rows
    return torch.where(kept[..., None], A, 0).sum(-2) / kept.sum(-1, keepdim=True)


def selectivity(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How much queries differ in what they look at: mean_t KL(A_t ‖ c on the keys visible to t), c the mean row.

    The restriction is renormalised by Z_t = Σ_{s visible to t} c_s. Range [0, log S] for full visibility; 0 when
    every query looks at the same keys (uniform heads and pure sinks alike), log S for a permutation. Null:
    `permuted_null`. O(T S).
    """
    c = column_mean(A, visible, rows)
    A, visible = shown(A, visible)
    Z = torch.where(visible, c[..., None, :], 0).sum(-1)
    return selectivity_from_summary(entropy_rows(A, visible), c, Z, rows, A.sum(-1))


def sink_mass(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Largest column mean, max_s mean_t A_ts: the share of attention that the most attended key takes.

    Range [1/S, 1]; null ≈ 1/S. Over all asked queries, also those that do not see the key. O(T S).
    """
    return column_mean(A, visible, rows).amax(-1)


def sink_position(
    A: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Int[Tensor, "*batch"]:
    """Index of the key with the largest column mean (see `sink_mass`). O(T S)."""
    return column_mean(A, visible, rows).argmax(-1)


def logit_std_rows(
    S: Float[Tensor, "*batch queries keys"], visible: Bool[Tensor, "*#batch #queries #keys"] | None = None
) -> Float[Tensor, "*batch queries"]:
    """Standard deviation of the visible logits of every query (over n_t, not n_t − 1)."""
    S, visible = shown(S, visible)
    n = visible.sum(-1, keepdim=True)
    mean = S.sum(-1, keepdim=True) / n
    return (torch.where(visible, S - mean, 0).square().sum(-1) / n[..., 0]).sqrt()


def logit_std(
    S: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean over queries of the standard deviation of the visible scaled logits S (population form, over n_t).

    Range [0, ∞); 0: uniform attention. Unlike the entropy it does not saturate. O(T S).
    """
    return mean_over_rows(logit_std_rows(S, visible), rows)


def log_context_gauge(
    S: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """b̂ = mean_t std_s(a_ts) / √log n_t, n_t the number of visible keys; queries that see one key are left out.

    Range [0, ∞). Random-energy transition at √2: below, a long context averages; above, each query attends to O(1)
    keys; finite contexts feel it from √2/2 (Giorlandino and Goldt 2025). O(T S).
    """
    _, seen = shown(S, visible)
    return mean_over_rows(log_context_gauge_rows(logit_std_rows(S, visible), seen.sum(-1)), rows)


def max_logit(
    S: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*#batch #queries #keys"] | None = None,
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Largest visible scaled logit of any asked query (a maximum, not a mean): what QK-Clip bounds. O(T S)."""
    S = accumulate(S)
    if visible is not None:
        S = torch.where(visible, S, torch.nan)
    peak = torch.where(S.isnan(), -torch.inf, S).amax(-1)
    return max_over_rows(torch.where(S.isnan().all(-1), torch.nan, peak), rows)
