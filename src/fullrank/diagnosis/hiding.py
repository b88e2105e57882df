"""A key hidden from the queries of other tokens, with the rows of attention renormalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fullrank.edit import Call

__all__ = ["hidden_keys", "hide"]


def hidden_keys(call: Call, real: Tensor | None, position: int, *, same: bool, causal: bool) -> Tensor:
    """Which pairs of a call are to be hidden from each other.

    Args:
        call: as it is made.
        real: (batch, keys), which keys are real; None for all.
        position: the key, counted over real keys from 0.
        same: whether queries and keys are the same tokens: then a token keeps its own key. Where there are fewer
            queries than keys they are the last ones in a causal call, and not the same tokens otherwise (pooled).
        causal: whether the stack never looks ahead.

    Returns:
        (batch | 1, heads | 1, queries, keys) bool: True at the key for every query that sees it, is not that of its
        token, and sees another key as well.
    """
    device, keys = call.value.device, call.keys
    if real is None:
        chosen = (torch.arange(keys, device=device) == position)[None]
    else:
        chosen = real & (real.cumsum(-1) == position + 1)
    hidden = chosen[:, None, None]
    if same and (call.queries == keys or (causal and call.queries < keys)):
        places = torch.arange(keys, device=device)
        hidden = hidden & (places != places[keys - call.queries :, None])
    visible = call.visible()
    if visible is None:
        visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    return hidden & visible & (visible & ~hidden).any(-1, keepdim=True)


def hide(call: Call, hidden: Tensor, heads: Sequence[int] = ()) -> Call:
    """A call whose softmax leaves out pairs of queries and keys.

    Args:
        call: as it is made.
        hidden: (batch | 1, heads | 1, queries | 1, keys) bool, at least one key left in every row.
        heads: in these only; in all by default.

    Returns:
        The call with other scores where it shows them, else with another bias; the call itself where nothing is hidden.
    """
    if not bool(hidden.any()):
        return call  # the same kernel, bit for bit
    if heads:
        rows = call.query if call.query is not None else call.logits
        assert rows is not None
        chosen = torch.zeros(rows.shape[1], 1, 1, dtype=torch.bool, device=hidden.device)
        chosen[list(heads)] = True
        hidden = hidden & chosen
    if call.logits is not None:
        return call.change(logits=call.logits.masked_fill(hidden, -torch.inf))
    bias = torch.zeros(hidden.shape, dtype=call.value.dtype, device=hidden.device).masked_fill(hidden, -torch.inf)
    return call.change(bias=bias if call.bias is None else call.bias + bias)
