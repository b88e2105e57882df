"""Masks under which each query sees one unbroken range of keys."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.masks.base import Device, Mask, Shape, restrict

__all__ = ["BlockLocal", "Causal", "Full", "Intervals", "Prefix", "SlidingWindow"]

Bounds = tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch queries"]]


def _clip(first: Tensor, stop: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    first = first.clamp(0, shape[3])
    return first, torch.maximum(first, stop.clamp(0, shape[3]))


def _positions(shape: Shape, device: Device) -> Tensor:
    return torch.arange(shape[2], device=device)[None]


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """All keys."""
        t = _positions(shape, device)
        return torch.zeros_like(t), torch.full_like(t, shape[3])


@dataclass(frozen=True)
class Causal(Mask):
    """Query t sees keys s ≤ t + offset.

    offset = 0 aligns the first query with the first key, as `is_causal` of torch does when there are fewer queries than
    keys; for queries that continue a cache of S − T keys pass offset = S − T.
    """

    offset: int = 0
    is_causal = True

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """[0, t + offset]."""
        t = _positions(shape, device)
        return _clip(torch.zeros_like(t), t + self.offset + 1, shape)


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """The `window` latest keys up to and including the query's own position: t + offset − window < s ≤ t + offset.

    With causal=False both sides: |t + offset − s| < window.
    """

    window: int
    causal: bool = True
    offset: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ShapeError(f"window={self.window}; a sliding window holds at least 1 key.")

    @property
    def is_causal(self) -> bool:  # type: ignore[override]
        """Whether it looks back only."""
        return self.causal

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """The window around the query's position."""
        t = _positions(shape, device) + self.offset
        return _clip(t - self.window + 1, t + (1 if self.causal else self.window), shape)


@dataclass(frozen=True)
class BlockLocal(Mask):
    """Tokens are cut into blocks of `size`; a query sees the keys of its own block."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ShapeError(f"size={self.size}; a block holds at least 1 token.")

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """The query's block."""
        first = _positions(shape, device) // self.size * self.size
        return _clip(first, first + self.size, shape)


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """All see the first `length` keys (one number, or one per sequence); beyond them attention is causal."""

    length: int | Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        if isinstance(self.length, Tensor):  # ranges are asked for on the host, block by block
            object.__setattr__(self, "length", self.length.cpu())

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """[0, max(length − 1, t)]."""
        t = _positions(shape, device)
        length = torch.as_tensor(self.length, device=device or "cpu").to(t.device).reshape(-1, 1)
        stop = torch.maximum(t + 1, length)
        return _clip(torch.zeros_like(stop), stop, shape)

    def select(self, batch: slice, heads: slice) -> Mask:
        """The prefixes of some sequences."""
        if isinstance(self.length, Tensor) and self.length.numel() > 1:
            return Prefix(self.length[batch])
        return self


@dataclass(frozen=True, eq=False)
class Intervals(Mask):
    """Query t sees first[t] ≤ s < stop[t]: any unbroken ranges, per sequence."""

    first: Int[Tensor, "batch queries"]
    stop: Int[Tensor, "batch queries"]
    is_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("first", "stop"):  # ranges are asked for on the host, block by block
            object.__setattr__(self, name, getattr(self, name).cpu())

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """As given."""
        if self.first.shape[1] != shape[2] or self.first.shape[0] not in (1, shape[0]):
            raise ShapeError(f"this mask has the bounds of {tuple(self.first.shape)} queries; the map has {shape}.")
        return _clip(self.first.to(device or "cpu"), self.stop.to(device or "cpu"), shape)

    def select(self, batch: slice, heads: slice) -> Mask:
        """The ranges of some sequences."""
        return Intervals(restrict(self.first, batch), restrict(self.stop, batch), self.is_causal)

    def leading(self, tokens: int) -> Mask:
        """The ranges of the first queries."""
        return Intervals(self.first[:, :tokens], self.stop[:, :tokens], self.is_causal)
