"""From the tensor a model passed to the mask it means."""

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.masks.base import Mask
from fullrank.operators.masks.intervals import Causal, Full, Intervals, SlidingWindow
from fullrank.operators.masks.tensors import Arbitrary, Padding

__all__ = ["from_additive", "recognise"]


def recognise(visible: Tensor) -> Mask:
    """The mask that a visibility tensor spells out; the answer always says exactly the same.

    Args:
        visible: True where the query sees the key, broadcastable to (batch, heads, queries, keys).

    Returns:
        `Full`, `Causal`, `SlidingWindow`, `Padding`, one of the middle two & `Padding` where equal to it, `Intervals`
        where every query sees one unbroken range, else `Arbitrary`. Cost: three passes over the tensor, by blocks.

    Raises:
        ShapeError: for a tensor that is not boolean or has more than four dimensions.
    """
    if visible.dtype != torch.bool or visible.ndim > 4 or visible.ndim == 0:
        raise ShapeError(
            f"visible is {visible.dtype} {tuple(visible.shape)}; expected a bool tensor of 1 to 4 dimensions."
        )
    visible = visible[(None,) * (4 - visible.ndim)]
    for dim in range(3):  # an expanded dimension says the same thing over and over; so may sequences and heads
        one = visible.narrow(dim, 0, 1)
        if visible.shape[dim] > 1 and (visible.stride(dim) == 0 or (dim < 2 and _repeats(visible, one))):
            visible = one
    real = visible.any(2)  # (batch, heads, keys)
    everywhere = bool(real.all())
    if visible.shape[2] == 1:
        if everywhere:
            return Full()
        return Padding(real[:, 0] if real.shape[1] == 1 else real)
    candidates: list[Mask] = [Full()]
    queries, keys = visible.shape[2:]
    candidates.append(Causal())
    if queries != keys:
        candidates.append(Causal(keys - queries))
    window = int(visible[0, 0, -1].sum())
    offset = max(keys - queries, 0)
    if 0 < window < queries:
        candidates.append(SlidingWindow(window, offset=offset))
    padding = None if everywhere else Padding(real[:, 0] if real.shape[1] == 1 else real)
    for candidate in candidates:
        mask = candidate if padding is None else candidate & padding
        if _equal(mask, visible):
            return mask if not (padding is not None and isinstance(candidate, Full)) else padding
    if visible.shape[1] == 1:
        intervals = _unbroken(visible)
        if intervals is not None:
            return intervals
    return Arbitrary(visible, bool(_looks_back(visible)))


def from_additive(mask: Float[Tensor, "..."]) -> tuple[Mask, Tensor | None]:
    """Split a mask that is added to the scores into who is visible and what is added to them.

    Hidden is what lies below half the lowest number of the dtype: models write −inf, `finfo.min`, or that plus a bias.

    Args:
        mask: broadcastable to (batch, heads, queries, keys).

    Returns:
        The mask, and the additive bias (0 where hidden) or None where it vanishes on all that is visible.
    """
    visible = mask > torch.finfo(mask.dtype).min / 2
    bias = torch.where(visible, mask, 0)
    return recognise(visible), bias if bool((bias != 0).any()) else None


def _blocks(visible: Tensor) -> list[slice]:
    rows = max(1, (1 << 22) // max(1, visible.shape[0] * visible.shape[1] * visible.shape[3]))
    return [slice(start, min(start + rows, visible.shape[2])) for start in range(0, visible.shape[2], rows)]


def _repeats(visible: Tensor, one: Tensor) -> bool:
    return all(bool((visible[:, :, rows] == one[:, :, rows]).all()) for rows in _blocks(visible))


def _equal(mask: Mask, visible: Tensor) -> bool:
    batch, heads, queries, keys = visible.shape
    shape = (batch, heads, queries, keys)
    for rows in _blocks(visible):
        block = mask.block(rows, slice(0, keys), shape, device=visible.device)
        found = visible[:, :, rows]
        if not bool(found.all() if block is None else (found == block).all()):
            return False
    return True


def _unbroken(visible: Tensor) -> Mask | None:
    keys = visible.shape[3]
    count = visible.sum(-1)[:, 0]
    first = visible.view(torch.uint8).argmax(-1)[:, 0]  # 0 for a query that sees nothing
    mask = Intervals(first, first + count)
    if not _equal(mask, visible):
        return None
    t = torch.arange(visible.shape[2], device=visible.device) + max(keys - visible.shape[2], 0)
    return Intervals(first, first + count, is_causal=bool((first + count <= t + 1).all()))


def _looks_back(visible: Tensor) -> Tensor:
    offset = max(visible.shape[3] - visible.shape[2], 0)
    t = torch.arange(visible.shape[2], device=visible.device)
    seen = torch.zeros((), dtype=torch.bool, device=visible.device)
    s = torch.arange(visible.shape[3], device=visible.device)
    for rows in _blocks(visible):
        seen = seen | (visible[:, :, rows] & (s > t[rows, None] + offset)).any()
    return ~seen
