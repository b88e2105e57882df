"""Whether a model was trained since: checksums of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import bare

__all__ = ["Checksums", "Since", "changed", "checksums", "differ", "parameters_of", "tensors_of"]

Checksums = Mapping[str, tuple[torch.dtype, int, int]]
"""By name of the parameter or buffer: its type and two sums over its bits."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 22  # numbers at a time: in 64 bits, without eight bytes for every number at once
_ODD = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class Since:
    """What happened to a model's tensors since checksums were taken.

    Attributes:
        moved: names of those with other values.
        rounded: names of those that are stored in a type in which their old values cannot be told.
    """

    moved: tuple[str, ...]
    rounded: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.moved or self.rounded)


def checksums(model: nn.Module) -> Checksums:
    """Two sums over the bits of each parameter and buffer, by its name: of the bits, and of the bits at their places.

    Version counters would not do: what is written through `.data`, as some optimisers do, does not move them.

    Args:
        model: the model.

    Returns:
        By name.
    """
    return {name: (tensor.dtype, *_sums(tensor, tensor.dtype)) for name, tensor in tensors_of(model)}


def changed(model: nn.Module, before: Checksums, names: Set[str] | None = None) -> Since:
    """Which tensors that are still there have other values than before.

    A tensor in another type has its old values where it gives them back, bit for bit, in the old type.

    Args:
        model: the model.
        before: its checksums then.
        names: those that are compared; all by default.

    Returns:
        Names, in the order of the model.
    """
    moved: list[str] = []
    rounded: list[str] = []
    for name, tensor in tensors_of(model):
        if name not in before or (names is not None and name not in names):
            continue
        dtype, *sums = before[name]
        if list(_sums(tensor, dtype)) != sums:
            (moved if tensor.dtype == dtype else rounded).append(name)
    return Since(tuple(moved), tuple(rounded))


def differ(before: Checksums, after: Checksums) -> bool:
    """Whether a tensor that both know has other values or another type."""
    return any(after[name] != sums for name, sums in before.items() if name in after)


def parameters_of(model: nn.Module) -> set[str]:
    """Names of a model's parameters."""
    return {name for name, _ in bare(model).named_parameters()}


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, with their names."""
    yield from bare(model).named_parameters()
    yield from bare(model).named_buffers()


def _sums(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    held = getattr(tensor, "_local_tensor", tensor).detach()
    if held.is_meta or type(held) not in (Tensor, nn.Parameter) or held.numel() == 0 or held.layout != torch.strided:
        return (0, 0)
    numbers = held.reshape(-1)
    first = second = 0
    for start in range(0, numbers.numel(), _PART):
        part = numbers[start : start + _PART].to(dtype).contiguous()
        if part.is_complex():
            part = torch.view_as_real(part).reshape(-1)
        wide = part.view(_INTEGERS[part.element_size()]).to(torch.int64)
        place = torch.arange(start, start + wide.numel(), device=wide.device)
        first += int(wide.sum())
        second += int((wide * (place * _ODD + 1)).sum())  # in whole numbers modulo 2⁶⁴
    return (first, second)
