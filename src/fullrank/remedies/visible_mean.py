"""UV: what attention returns that looks at all visible keys alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call

__all__ = ["visible_mean"]


def visible_mean(call: Call) -> Tensor:
    """The mean of the values over the keys that each query sees, for every head.

    U_ts = 1/#visible(t) where t sees s. Without a mask it is a mean over the sequence, or a running mean where causal,
    in O(T); any other mask is one product with U, in O(T²).

    Args:
        call: as it was made.

    Returns:
        (batch, heads, queries, width of values); broadcasts over queries where all see the same. 0 where nothing is
        visible.
    """
    V = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    if call.logits is None and call.mask is None and call.window is None:
        if not call.causal:
            mean = V.mean(-2, keepdim=True)
        else:
            seen = torch.arange(1, call.keys + 1, device=V.device, dtype=V.dtype)[:, None]
            mean = (V.cumsum(-2) / seen)[..., : call.queries, :]
        return _per_query_head(mean, rows.shape[1]).to(call.value.dtype)
    visible = call.visible()
    if visible is None:
        return _per_query_head(V.mean(-2, keepdim=True), rows.shape[1]).to(call.value.dtype)
    U = visible.to(V.dtype)
    U = U / U.sum(-1, keepdim=True).clamp(min=1)
    return (U @ _per_query_head(V, rows.shape[1])).to(call.value.dtype)


def _per_query_head(values: Tensor, heads: int) -> Tensor:
    groups = heads // values.shape[1]
    return values if groups == 1 else values.repeat_interleave(groups, 1)
