"""From numbers per query to a number per head: where dense definitions and the streaming summary meet.

Every function takes one value per row of an attention map, (*batch, queries). Rows that are not asked for (`rows`
false) and rows on which a number is not defined (NaN: no visible key, or a single one where log 1 = 0 would divide)
enter no mean.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

__all__ = [
    "effective_keys_rows",
    "log_context_gauge_rows",
    "max_over_rows",
    "mean_over_rows",
    "normalized_entropy_rows",
    "selectivity_from_summary",
]


def mean_over_rows(
    values: Float[Tensor, "*batch queries"], rows: Bool[Tensor, "*#batch #queries"] | None = None
) -> Float[Tensor, "*batch"]:
    """Mean of the defined values of the asked rows; NaN where there is none."""
    defined = ~values.isnan()
    if rows is not None:
        defined = defined & rows
    return torch.where(defined, values, 0).sum(-1) / defined.sum(-1)


def max_over_rows(
    values: Float[Tensor, "*batch queries"], rows: Bool[Tensor, "*#batch #queries"] | None = None
) -> Float[Tensor, "*batch"]:
    """Largest of the defined values of the asked rows; NaN where there is none."""
    defined = ~values.isnan()
    if rows is not None:
        defined = defined & rows
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.nan)
    peak = torch.where(defined, values, -torch.inf).amax(-1)
    return torch.where(defined.any(-1), peak, torch.nan)


def normalized_entropy_rows(
    entropy: Float[Tensor, "*batch queries"], visible_count: Num[Tensor, "*#batch #queries"]
) -> Float[Tensor, "*batch queries"]:
    """H_t / log n_t, n_t the number of keys that query t sees; NaN where n_t < 2."""
    return torch.where(visible_count >= 2, entropy / visible_count.to(entropy.dtype).log(), torch.nan)


def effective_keys_rows(entropy: Float[Tensor, "*batch queries"]) -> Float[Tensor, "*batch queries"]:
    """Exp H_t: over how many keys a uniform row of the same entropy would spread."""
    return entropy.exp()


def log_context_gauge_rows(
    logit_std: Float[Tensor, "*batch queries"], visible_count: Num[Tensor, "*#batch #queries"]
) -> Float[Tensor, "*batch queries"]:
    """b̂_t = std_s(a_ts) / √log n_t; NaN where n_t < 2."""
    return torch.where(visible_count >= 2, logit_std / visible_count.to(logit_std.dtype).log().sqrt(), torch.nan)


def selectivity_from_summary(
    entropy: Float[Tensor, "*batch queries"],
    column_mean: Float[Tensor, "*batch keys"],
    visible_mass: Float[Tensor, "*batch queries"],
    rows: Bool[Tensor, "*#batch #queries"] | None = None,
    row_sum: Float[Tensor, "*batch queries"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean over rows of KL(A_t ‖ c restricted to the keys visible to t), from row entropies and column mass alone.

    For rows that sum to one: −mean H_t − Σ_s c_s log c_s + mean log Z_t with c the column mean over the same rows
    and Z_t = Σ_{s visible to t} c_s. Rows that sum to r_t < 1 (a learned sink took the rest) enter as A_t/r_t with
    weight r_t.

    Args:
        entropy: H_t = −Σ_s A_ts log A_ts.
        column_mean: c, mean over the rows asked for.
        visible_mass: Z_t.
        rows: the rows asked for; the same that `column_mean` was taken over.
        row_sum: r_t where rows do not sum to one.

    Returns:
        Nats, one per map; at least 0.
    """
    c = column_mean
    spread = -torch.xlogy(c, c).sum(-1)
    log_Z = visible_mass.log()
    if row_sum is None:
        found = spread - mean_over_rows(entropy, rows) + mean_over_rows(log_Z, rows)
    else:
        r = torch.where(entropy.isnan(), torch.nan, row_sum)
        gain = torch.where(r > 0, torch.xlogy(r, visible_mass), 0) - torch.xlogy(r, r)
        gain = torch.where(r.isnan(), torch.nan, gain)
        found = (spread - mean_over_rows(entropy, rows) + mean_over_rows(gain, rows)) / mean_over_rows(r, rows)
    return found.clamp(min=0)  # rounding only: a divergence is not negative
