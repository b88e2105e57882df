"""Whether a model was trained since: checksums of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import bare

__all__ = ["Checksums", "checksums", "differ"]

Checksums = Mapping[str, tuple[int, int]]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(model: nn.Module) -> Checksums:
    """Two sums over the bits of each parameter, by its name.

    Version counters would not do: what is written through `.data`, as some optimisers do, does not move them.

    Args:
        model: the model.

    Returns:
        By name of the parameter.
    """
    return {name: _sums(parameter) for name, parameter in bare(model).named_parameters()}


def differ(before: Checksums, now: Checksums) -> bool:
    """Whether a parameter that both know of has other bits."""
    return any(sums != now[name] for name, sums in before.items() if name in now)


def _sums(parameter: Tensor) -> tuple[int, int]:
    held = getattr(parameter, "_local_tensor", parameter).detach()
    if held.is_meta or type(held) not in (Tensor, nn.Parameter) or held.numel() == 0:
        return (0, 0)
    bits = held.reshape(-1).contiguous().view(_INTEGERS[held.element_size()])
    first = second = 0
    for part in bits.split(1 << 24):  # in 64 bits, without eight bytes for every number at once
        wide = part.to(torch.int64)
        first += int(wide.sum())
        second += int((wide * wide).sum())
    return (first, second)
