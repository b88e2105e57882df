"""Which tokens are no padding, as attention is told."""

from __future__ import annotations

from torch import Tensor

from fullrank.edit import Call
from fullrank.remedies.attention.scores import seen_in

__all__ = ["unpadded"]


def unpadded(call: Call) -> Tensor | None:
    """The tokens that some query of their own sequence may see, but for causality and windows that the kernel applies.

    Args:
        call: an attention call of a stream to itself.

    Returns:
        (batch, tokens) bool, or (1, tokens) where it is the same for all; None where all are, or where there is not a
        key for each query.
    """
    if call.queries != call.keys or (call.logits is None and call.mask is None):
        return None
    seen = seen_in(call.change(causal=False, window=None))
    return None if seen is None else seen.expand(*seen.shape[:-1], call.keys).any(-2).any(1)
