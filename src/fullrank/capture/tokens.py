"""Is a call attention over tokens, or over channels, experts or heads?"""

from __future__ import annotations

import torch

from fullrank.capture.calls import KernelCall
from fullrank.capture.layout import Layout
from fullrank.capture.reading import Unreadable, shape_of

__all__ = ["over_tokens"]


def over_tokens(call: KernelCall, stream: torch.Size | None, heads: int | None, layout: Layout) -> bool:
    """Whether the rows of the map are tokens of the stream around it.

    A map whose values have the tokens as their width and whose rows are the channels of a head attends over channels
    (XCiT). A made map of two dimensions in a batch, or of three that are not square, is a router (tokens × experts).

    Args:
        call: the kernel call.
        stream: shape of the block's stream.
        heads: of the module that called.
        layout: of that stream.

    Returns:
        False where it is known to be something else.
    """
    if stream is None:
        return False
    batch, tokens, width = layout.sizes(stream)
    try:
        _, h, queries, keys = shape_of(call, batch, heads)
    except Unreadable:
        return False
    channels = queries == keys and queries != tokens and queries * h == width
    if channels and call.value is not None and call.value.shape[-1] == tokens:
        return False
    if call.weights is None:
        return True
    if call.weights.ndim == 2:
        return len(stream) == 2 and queries == tokens == keys
    return call.weights.ndim > 3 or h > 1 or queries == keys
