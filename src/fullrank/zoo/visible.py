"""Which keys a query sees: order, window and padding in one boolean tensor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["visible_keys"]


def visible_keys(tokens: int, *, causal: bool, window: int | None, real: Tensor | None, device: torch.device) -> Tensor:
    """True where a query sees a key.

    Query i sees key j where j ≤ i, if causal; where i − j < window if causal, |i − j| ≤ window // 2 if not; and where j
    is real. A query that would see nothing, as padding before a causal sequence does, sees itself.

    Args:
        tokens: in a sequence.
        causal: whether queries see no later keys.
        window: how many keys a query sees at most; None for all.
        real: (sequences, tokens), which tokens are no padding; None for all.
        device: where it is needed.

    Returns:
        (tokens, tokens), or (sequences, 1, tokens, tokens) with padding.
    """
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window if causal else distance.abs() <= window // 2)
    if real is None:
        return visible
    visible = visible & real.bool()[:, None, None, :]
    return visible | (~visible.any(-1, keepdim=True) & (distance == 0))
