"""What one streaming pass over a map of attention leaves behind."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """Numbers of each row of A (float64), and the mean row of one or several groups of rows.

    A is what the model multiplies V by: with a learned sink its rows sum to less than one, and entropy and Σ A² are of
    these entries as they are. Rows that see no key are NaN and enter no mean. Logits are the visible, scaled scores
    with bias and soft-cap, without the sink; their standard deviation is that of the population, √mean (s − mean s)².

    Attributes:
        log_sum_exp: logarithm of the softmax's denominator, the sink included, so that A = exp(s − log_sum_exp).
        entropy: −Σ_s A_ts log A_ts, in nat.
        inverse_participation: Σ_s A_ts².
        max_logit: largest visible logit.
        logit_mean: mean of the visible logits.
        logit_std: their standard deviation.
        visible: how many keys the query sees.
        row_sum: Σ_s A_ts; 1 without a sink.
        column_mean: mean over the rows of a group (those of them that see a key) of A; NaN for a group without rows.
    """

    log_sum_exp: Float[Tensor, "batch heads queries"]
    entropy: Float[Tensor, "batch heads queries"]
    inverse_participation: Float[Tensor, "batch heads queries"]
    max_logit: Float[Tensor, "batch heads queries"]
    logit_mean: Float[Tensor, "batch heads queries"]
    logit_std: Float[Tensor, "batch heads queries"]
    visible: Int[Tensor, "batch heads queries"]
    row_sum: Float[Tensor, "batch heads queries"]
    column_mean: Float[Tensor, "groups batch heads keys"]
