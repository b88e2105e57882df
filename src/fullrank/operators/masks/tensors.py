"""Masks that come with a tensor: padding, packed documents, anything at all."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.masks.base import Device, Mask, Shape, restrict

__all__ = ["Arbitrary", "Packed", "Padding"]

Bounds = tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch queries"]]


def _everything(shape: Shape, device: Device) -> Bounds:
    first = torch.zeros(1, shape[2], dtype=torch.long, device=device)
    return first, torch.full_like(first, shape[3])


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys that are not real are seen by no query.

    Attributes:
        real: True for real tokens, (batch, keys), or (batch, heads, keys) where heads differ.
    """

    real: Bool[Tensor, "batch keys"] | Bool[Tensor, "batch heads keys"]

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """All keys."""
        return _everything(shape, device)

    def keys(self, shape: Shape, device: Device = None) -> Bool[Tensor, "#batch #heads keys"] | None:
        """The real ones."""
        real = self.real if self.real.ndim == 3 else self.real[:, None]
        if real.shape[-1] != shape[3] or real.shape[0] not in (1, shape[0]) or real.shape[1] not in (1, shape[1]):
            raise ShapeError(f"real has the shape {tuple(self.real.shape)}; the map has {shape[0]} × {shape[3]} keys.")
        return real if device is None else real.to(device)

    def select(self, batch: slice, heads: slice) -> Mask:
        """The keys of some sequences and heads."""
        return Padding(restrict(self.real, batch, heads if self.real.ndim == 3 else None))

    def leading(self, tokens: int) -> Mask:
        """The first keys."""
        return Padding(self.real[..., :tokens])


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    """Several documents in one sequence: a query sees the keys of its own document.

    Attributes:
        document: number of the document of each token; documents need not be contiguous, but cost less when they are.
    """

    document: Int[Tensor, "batch tokens"]
    _bounds: Bounds | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self._bounds is None:
            object.__setattr__(self, "_bounds", _runs(self.document) or ())

    @property
    def plain(self) -> bool:  # type: ignore[override]
        """Whether every document is one unbroken run."""
        return bool(self._bounds)

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """The query's document, where documents are contiguous."""
        if self.document.shape[1] != shape[2] or shape[2] != shape[3] or self.document.shape[0] not in (1, shape[0]):
            raise ShapeError(f"document has the shape {tuple(self.document.shape)}; the map has {shape}.")
        if not self._bounds:
            return _everything(shape, device)
        first, stop = self._bounds
        return first.to(device or "cpu"), stop.to(device or "cpu")

    def pattern(self, queries: slice, keys: slice, shape: Shape) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """Same document, where documents are not contiguous."""
        if self._bounds:
            return None
        return (self.document[:, queries, None] == self.document[:, None, keys])[:, None]

    def select(self, batch: slice, heads: slice) -> Mask:
        """The documents of some sequences."""
        return Packed(restrict(self.document, batch))

    def leading(self, tokens: int) -> Mask:
        """The documents of the first tokens."""
        return Packed(self.document[:, :tokens])


def _runs(document: Tensor) -> tuple[Tensor, Tensor] | None:
    document = document.cpu()
    tokens = document.shape[1]
    t = torch.arange(tokens).expand_as(document)
    new = torch.ones_like(document, dtype=torch.bool)
    new[:, 1:] = document[:, 1:] != document[:, :-1]
    ordered = document.sort(-1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1
    if tokens and not torch.equal(new.sum(-1), distinct):
        return None
    first = torch.where(new, t, 0).cummax(-1).values
    ends = torch.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    stop = torch.where(ends, t + 1, tokens).flip(-1).cummin(-1).values.flip(-1)
    return first, stop


@dataclass(frozen=True, eq=False)
class Arbitrary(Mask):
    """Any visibility at all.

    Attributes:
        visible: True where the query sees the key, broadcastable to (batch, heads, queries, keys).
    """

    visible: Bool[Tensor, "..."]
    is_causal: bool = False
    plain = False

    def __post_init__(self) -> None:
        if self.visible.ndim > 4:
            raise ShapeError(f"visible has {self.visible.ndim} dimensions; at most 4 (batch, heads, queries, keys).")
        shaped = self.visible[(None,) * (4 - self.visible.ndim)]
        object.__setattr__(self, "visible", shaped)

    def intervals(self, shape: Shape, device: Device = None) -> Bounds:
        """All keys: what is hidden is left to the pattern."""
        for name, found, wanted in zip(("batch", "heads", "queries", "keys"), self.visible.shape, shape, strict=True):
            if found not in (1, wanted):
                raise ShapeError(f"visible has {found} {name}; the map has {wanted}.")
        return _everything(shape, device)

    def pattern(self, queries: slice, keys: slice, shape: Shape) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """The block as it stands."""
        rows = queries if self.visible.shape[2] != 1 else slice(0, 1)
        columns = keys if self.visible.shape[3] != 1 else slice(0, 1)
        block = self.visible[:, :, rows, columns]
        return block.expand(-1, -1, -1, keys.stop - keys.start)

    def select(self, batch: slice, heads: slice) -> Mask:
        """The visibility of some sequences and heads."""
        return Arbitrary(restrict(self.visible, batch, heads), self.is_causal)

    def leading(self, tokens: int) -> Mask:
        """The visibility among the first tokens."""
        return Arbitrary(self.visible[:, :, :tokens, :tokens], self.is_causal)
