"""From a kernel call as it was seen to the attention map it computes: axes, heads, masks, causality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fullrank.capture.calls import KernelCall
from fullrank.operators import AttentionMap, AttentionOperator, DenseAttention, Scores
from fullrank.operators.masks import Causal, Full, Mask, from_additive, recognise
from fullrank.operators.scores import Bias

__all__ = [
    "MaskReader",
    "Reading",
    "Shape",
    "Unreadable",
    "exchanged",
    "fold",
    "fold_mask",
    "folded",
    "looks_back",
    "read",
    "sequences_and_heads",
    "shape_of",
    "visible_in",
]

Shape = tuple[int, int, int, int]
"""(batch, heads, queries, keys)."""

_GAP = 9000.0
"""A logit this far below the row's largest is a mask: models that do not write −inf write −10000, −65504 or −1e9."""


_HIDDEN = -5e8
"""Nothing in a row whose largest logit is below this is visible: padded queries, where a model writes −1e9 or −1e10."""


class Unreadable(Exception):  # noqa: N818 - a reason on its way to a note, never shown as an error
    """Why a call is not handed on."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A call in the form that observers see.

    Attributes:
        attention: the map.
        value: (batch, key-value heads, keys, width) or None.
        causal: whether no query sees a later key.
    """

    attention: AttentionMap
    value: Tensor | None
    causal: bool

    def seen_keys(self) -> Tensor | None:
        """(batch, keys), the keys that the mask hides from no query of any head; None when that is all."""
        batch, heads, queries, keys = self.attention.shape
        real = self.attention.mask.keys((batch, heads, queries, keys), self.attention.device)
        return None if real is None else real.any(1).expand(batch, keys)


class MaskReader:
    """Reads each mask tensor of a forward once: models hand the same one to all their layers."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[Tensor, int, Mask, Tensor | None]] = {}

    def read(self, mask: Tensor) -> tuple[Mask, Tensor | None]:
        """Who is visible, and what is added to the scores beside that (None where nothing is)."""
        version = -1 if mask.is_inference() else mask._version
        found = self._read.get(id(mask))
        if found is not None and found[0] is mask and found[1] == version:
            return found[2], found[3]
        read = (recognise(mask), None) if mask.dtype == torch.bool else from_additive(mask)
        if len(self._read) >= 4:
            self._read.clear()  # layers that each make their own mask must not pile up
        self._read[id(mask)] = (mask, version, *read)
        return read

    def clear(self) -> None:
        """Forget the masks: a new forward begins."""
        self._read.clear()


def shape_of(call: KernelCall, batch: int, heads: int | None = None) -> Shape:
    """(batch, heads, queries, keys) of a call, without looking at a number.

    Args:
        call: the kernel call.
        batch: sequences in the residual stream around it.
        heads: of the module that called, where it says so.

    Returns:
        The shape.
    """
    call = _sequences_first(call, batch, heads)
    rows = call.weights if call.weights is not None else call.query
    assert rows is not None
    keys = call.weights.shape[-1] if call.weights is not None else _present(call.key).shape[-2]
    return (*sequences_and_heads(rows, batch, call.heads or heads), rows.shape[-2], keys)


def read(call: KernelCall, batch: int, *, heads: int | None = None, masks: MaskReader | None = None) -> Reading:
    """Bring a call into (batch, heads, queries, keys) and say what it computes.

    Args:
        call: the kernel call.
        batch: sequences in the residual stream around it: tells a batch axis from heads folded into it.
        heads: of the module that called, where it says so.
        masks: remembers the masks of this forward.

    Returns:
        The map, its values and its causality.

    Raises:
        Unreadable: where they cannot be known.
    """
    if call.unknown:
        raise Unreadable(call.unknown)
    call = _sequences_first(call, batch, heads)  # twice is once: then the first axis is the batch
    shape = shape_of(call, batch, heads)
    if call.weights is not None:
        return _read_weights(call, shape)
    query, key = fold(_present(call.query), shape[0]), fold(_present(call.key), shape[0])
    mask: Mask = Full()
    bias: Bias | None = call.bias
    if call.mask is not None:
        mask, bias = (masks or MaskReader()).read(fold_mask(call.mask, _present(call.query).shape[:-2], *shape[:2]))
    if call.causal:
        mask = Causal() if isinstance(mask, Full) else mask & Causal()
    if call.visible is not None:
        mask = call.visible if isinstance(mask, Full) else mask & call.visible
    scores = Scores(query, key, scale=call.scale, mask=mask, bias=bias, softcap=call.softcap, sink=_detached(call.sink))
    value = None if call.value is None else fold(call.value, shape[0])
    return Reading(AttentionOperator(scores), value, _causal(mask, shape))


def folded(tensor: Tensor, call: KernelCall, batch: int, heads: int | None = None) -> Tensor:
    """A tensor of a call, (…, tokens, width), as (batch, heads, tokens, width), as `read` lays out the call's own.

    Args:
        tensor: laid out as the call's queries, keys or values are.
        call: the call; only the shapes of its tensors are looked at.
        batch: sequences in the residual stream around it.
        heads: of the module that called, where it says so.

    Returns:
        A view where that is possible.
    """
    moved = _sequences_first(replace(call, value=tensor), batch, heads)
    return fold(_present(moved.value), shape_of(moved, batch, heads)[0])


def _sequences_first(call: KernelCall, batch: int, heads: int | None) -> KernelCall:
    """The call with its leading axes as (sequences, …, heads), where they can be told and are in another order."""
    rows = call.weights if call.weights is not None else call.query
    axes = None if rows is None else exchanged(rows, batch, heads)
    if rows is None or axes is None:
        return call
    names = ("query", "key", "value", "weights", "logits", "mask")
    found = {name: tensor for name in names if (tensor := getattr(call, name)) is not None and tensor.ndim == rows.ndim}
    return replace(call, **{name: tensor.transpose(*axes) for name, tensor in found.items()})


def exchanged(rows: Tensor, batch: int | None, heads: int | None) -> tuple[int, int] | None:
    """Which two leading axes must change places for (sequences, …, heads, queries, ·).

    Args:
        rows: queries or a map, (…, queries, ·).
        batch: sequences in the residual stream around it, where known.
        heads: of the module that called, where it says so.

    Returns:
        Two axes; None where nothing is to be exchanged, or nothing tells it.

    Raises:
        Unreadable: where two axes could both be the heads.
    """
    if rows.ndim == 5 and heads is not None and heads in rows.shape[1:3]:  # windows, before the heads or after them
        if rows.shape[1] == rows.shape[2] > 1:
            raise Unreadable(f"two axes of {heads} could both be the heads")
        return None if rows.shape[2] == heads else (1, 2)
    if batch is None or rows.ndim != 4 or rows.shape[1] != batch or rows.shape[0] == batch:
        return None
    return None if rows.shape[0] != heads and rows.shape[0] % batch == 0 else (0, 1)


def _read_weights(call: KernelCall, shape: Shape) -> Reading:
    weights = _present(call.weights).reshape(shape)
    visible = logits = None
    if call.logits is not None:
        logits = call.logits.reshape(shape)
        visible = visible_in(logits)
    mask = recognise(visible if visible is not None else weights > 0)
    sink = None
    if call.sink_column:  # what is missing to 1; in half precision the sum itself would be off, and could exceed 1
        total = weights.sum(-1, dtype=torch.promote_types(weights.dtype, torch.float32))
        sink = (1 - total).clamp(min=0)
    value = None if call.value is None else fold(call.value, shape[0])
    attention = DenseAttention(weights, logits=logits, visible=mask, sink=sink)
    return Reading(attention, value, _causal(mask, shape))


def looks_back(call: KernelCall, masks: MaskReader) -> bool:
    """Whether no query of a call sees a later key, without reading the rest of it; False for a single query."""
    if call.weights is not None:
        visible = call.weights > 0 if call.logits is None else visible_in(call.logits)
        return visible.shape[-2] > 1 and visible.shape[-2] == visible.shape[-1] and not bool(visible.triu(1).any())
    several = call.query is not None and call.query.shape[-2] > 1
    if several and call.visible is not None and call.visible.is_causal:
        return True
    return several and (call.causal or (call.mask is not None and bool(masks.read(call.mask)[0].is_causal)))


def visible_in(logits: Tensor) -> Tensor:
    """Where scores, or what is added to them, are not masked: bool, of their shape."""
    floor = max(torch.finfo(logits.dtype).min / 2, _HIDDEN)
    return logits > (logits.amax(-1, keepdim=True) - _GAP).clamp(min=floor)


def _causal(mask: Mask, shape: Shape) -> bool:
    return bool(mask.is_causal) and shape[2] > 1


def sequences_and_heads(rows: Tensor, batch: int | None, heads: int | None) -> tuple[int, int]:
    """What the leading axes of queries or of a map, (sequences, …, heads, queries, ·), hold: sequences and heads.

    Args:
        rows: in that order; sequences and heads may be folded into one axis.
        batch: sequences in the residual stream around it, where known.
        heads: of the module that called, where it says so.

    Returns:
        (batch, heads), windows counted as sequences.

    Raises:
        Unreadable: where the two are folded and cannot be told apart.
    """
    if rows.ndim == 2:
        return 1, 1
    if rows.ndim > 3:
        return rows.shape[:-3].numel(), rows.shape[-3]
    folded = rows.shape[0]
    if heads is not None and batch is not None and folded == batch * heads:
        return batch, heads
    if folded == batch:
        return folded, 1
    if heads is not None and folded % heads == 0:
        return folded // heads, heads
    if batch is not None and folded % batch == 0:
        return batch, folded // batch
    around = "" if batch is None else f" for {batch} sequences"
    raise Unreadable(f"{folded} maps{around}: sequences and heads cannot be told apart")


def fold(tensor: Tensor, batch: int) -> Tensor:
    """(…, tokens, width) as (batch, heads, tokens, width); the heads may be fewer than those of the queries."""
    if tensor.ndim <= 3 and tensor.shape[:-2].numel() % batch:
        return tensor.reshape(1, -1, *tensor.shape[-2:])
    if tensor.ndim > 3 and tensor.shape[:-3].numel() in (1, batch):
        return tensor.reshape(-1, *tensor.shape[-3:])
    return tensor.reshape(batch, -1, *tensor.shape[-2:])


def fold_mask(mask: Tensor, leading: Sequence[int], batch: int, heads: int) -> Tensor:
    """A mask that broadcasts to (…, queries, keys) as one that broadcasts to (batch, heads, queries, keys).

    Args:
        mask: as the kernel got it.
        leading: the axes of the queries before the last two, (sequences, …, heads).
        batch: what they hold of sequences.
        heads: what they hold of heads.

    Returns:
        The mask itself where it is one already.
    """
    if mask.ndim <= 2 or (len(leading) == 2 and mask.ndim <= 4):
        return mask
    mask = mask[(None,) * (len(leading) + 2 - mask.ndim)]
    if all(size == 1 for size in mask.shape[:-2]):
        return mask.reshape(1, 1, *mask.shape[-2:])
    return mask.expand(*leading, *mask.shape[-2:]).reshape(batch, heads, *mask.shape[-2:])


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise Unreadable("its queries or keys are not known")
    return tensor


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
