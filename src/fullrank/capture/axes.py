"""Which axes of a stream hold tokens and which its width, where it has more or fewer than three."""

from __future__ import annotations

import math

import torch
from torch import nn

from fullrank.capture.layout import Axes
from fullrank.capture.reading import Unreadable, shape_of
from fullrank.capture.visits import Visit

__all__ = ["axes_of"]


def axes_of(visits: list[Visit]) -> Axes:
    """What the axes of a stack's stream hold.

    A grid has its width where rows and heads of some attention call fill the places and the channels exactly; where
    nothing attends, an image or a plain vector is a sample as a whole.

    Args:
        visits: the blocks.

    Returns:
        `unknown` where a stream of four dimensions fits both ways or neither.
    """
    shapes = {len(visit.shape) for visit in visits if visit.shape is not None}
    if not any(visit.attended or visit.unread for visit in visits):
        return "samples" if shapes - {3} or _convolves(visits) else "tokens"
    if shapes <= {2, 3}:
        return "tokens"
    first = any(_fills(visit, visit.shape[2:].numel(), visit.shape[1]) for visit in visits if visit.shape is not None)
    last = any(_fills(visit, visit.shape[1:-1].numel(), visit.shape[-1]) for visit in visits if visit.shape is not None)
    if first == last:
        return "unknown"
    return "channels first" if first else "channels last"


def _fills(visit: Visit, places: int, width: int) -> bool:
    if visit.shape is None or len(visit.shape) != 4:
        return False
    for attended in visit.attended:
        try:
            batch, heads, queries, _ = shape_of(attended.call, visit.shape[0], attended.heads)
        except Unreadable:
            continue
        value = attended.call.value
        if value is not None and batch * queries == visit.shape[0] * places and heads * value.shape[-1] == width:
            return True
    return False


def _convolves(visits: list[Visit]) -> bool:
    # (samples, channels, length): blocks convolve along the last axis, and no matrix or norm takes it for features
    shape = next((visit.shape for visit in visits if visit.shape is not None), torch.Size())
    if len(shape) != 3:
        return False
    modules = [module for visit in visits for module in visit.module.modules()]
    over_last = any(
        (isinstance(module, nn.Linear) and module.in_features == shape[-1])
        or (isinstance(module, nn.LayerNorm) and math.prod(module.normalized_shape) == shape[-1])
        for module in modules
    )
    return not over_last and any(
        isinstance(module, nn.modules.conv._ConvNd) and module.in_channels == shape[1] for module in modules
    )
