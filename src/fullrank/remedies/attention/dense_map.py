"""The map of an attention call as a matrix, for what no product with it can give."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call
from fullrank.errors import EditError

__all__ = ["dense_map", "refuse_other_maps"]


def dense_map(call: Call) -> Tensor:
    """A = softmax(scale · QKᵀ + bias, where visible), in O(T²) time and memory per head.

    Args:
        call: as it was made in the end; attention dropout is in the map where the model softmaxes by itself.

    Returns:
        (batch, heads, queries, keys) in float32 at least; a query that sees nothing has a row of zeros.
    """
    with torch.autocast(call.value.device.type, enabled=False):
        return _dense_map(call)


def _dense_map(call: Call) -> Tensor:
    wide = torch.promote_types(call.value.dtype, torch.float32)
    if call.weights is not None:  # put in by another edit, or made by the model itself
        seen = call.visible()
        return call.weights.to(wide) if seen is None else call.weights.to(wide) * seen
    if call.logits is not None:
        s = call.logits.to(wide)
    else:
        assert call.query is not None
        assert call.key is not None
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        scale = call.scale if call.scale is not None else call.query.shape[-1] ** -0.5
        s = (call.query.to(wide) * scale) @ key.to(wide).mT
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        if call.bias is not None:
            s = s + call.bias
        if call.mask is not None and call.mask.dtype != torch.bool:
            s = s + call.mask
    visible = call.visible()
    if visible is None:
        return s.softmax(-1)
    s = s.masked_fill(~visible, torch.finfo(wide).min)
    return s.softmax(-1) * visible


def refuse_other_maps(call: Call, remedy: str) -> None:
    """Refuse a call whose map is not the one that its queries and keys, or its scores, say.

    Args:
        call: as all edits have made it.
        remedy: for the sentence.

    Raises:
        EditError: where it has a sink, or is computed by another edit.
    """
    if call.attend is not None or call.sink is not None:
        raise EditError(
            f"{remedy} needs the map of a softmax, and that of {call.place.path} is made otherwise (with a sink, or by "
            "another remedy)."
        )
