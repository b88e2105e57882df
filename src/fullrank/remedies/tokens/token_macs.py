"""Multiply-accumulates of a forward, counted from the shapes of the products that happen in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fullrank.capture import undisturbed
from fullrank.capture.reference import reference_path
from fullrank.capture.wrappers import bare

__all__ = ["counted_macs"]


def counted_macs(model: nn.Module, forward: Callable[[], Any]) -> float:
    """Matrix products, convolutions and attention kernels of one forward in evaluation mode, one per two operations.

    Norms, sums and activations are not counted; what a repair computes beside is.

    Args:
        model: the model; it is left as it was.
        forward: one forward pass of it.

    Returns:
        How many, of the whole batch.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {} if kernel is None else {kernel: attention}
    with (
        undisturbed(model),
        reference_path(bare(model), []),
        FlopCounterMode(display=False, custom_mapping=mapping) as count,
    ):
        forward()
    return float(count.get_total_flops()) / 2
