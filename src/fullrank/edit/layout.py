"""Bringing the tensors of a kernel call into (batch, heads, tokens, width), and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.errors import EditError

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How a model lays out the leading axes of its queries, or of its maps.

    Attributes:
        lead: the axes before the last two.
        batch: what they hold of sequences (or windows).
        heads: what they hold of heads.
        swapped: whether they are (heads, batch).
    """

    lead: tuple[int, ...]
    batch: int
    heads: int
    swapped: bool = False

    @classmethod
    def of(cls, shape: torch.Size, batch: int | None, heads: int | None, path: str) -> Layout:
        """Read the leading axes.

        Args:
            shape: of queries or of a map.
            batch: sequences in what the module was called with.
            heads: that the module states.
            path: of the module, for the error.

        Returns:
            The layout.

        Raises:
            EditError: where sequences and heads are folded and cannot be told apart.
        """
        lead = tuple(shape[:-2])
        if not lead:
            return cls(lead, 1, 1)
        if len(lead) == 1:
            (folded,) = lead
            if heads is not None and batch is not None and folded == batch * heads:
                return cls(lead, batch, heads)
            if folded == batch:
                return cls(lead, folded, 1)
            if heads is not None and folded % heads == 0:
                return cls(lead, folded // heads, heads)
            if batch is not None and folded % batch == 0:
                return cls(lead, batch, folded // batch)
            raise EditError(f"attention in {path} cannot be edited: {folded} maps, of which heads are not told apart.")
        if len(lead) == 2 and lead[0] != batch and lead[1] == batch and (lead[0] == heads or lead[0] % batch):
            return cls(lead, lead[1], lead[0], swapped=True)
        before = 1
        for size in lead[:-1]:
            before *= size
        return cls(lead, before, lead[-1])

    def fold(self, tensor: Tensor) -> Tensor:
        """A tensor of queries, keys, values or outputs in four dimensions; its heads may be fewer."""
        last = tensor.shape[-2:]
        if self.swapped:
            return tensor.transpose(0, 1)
        if tensor.ndim == 4:
            return tensor
        if tensor.ndim > 4:
            return tensor.reshape(-1, *tensor.shape[-3:])
        if tensor.ndim == 2:
            return tensor[None, None]
        if tensor.shape[0] % self.batch:
            return tensor.reshape(1, -1, *last)
        return tensor.reshape(self.batch, -1, *last)

    def unfold(self, tensor: Tensor, like: Tensor, what: str) -> Tensor:
        """A tensor of four dimensions in the model's own layout.

        Args:
            tensor: what an edit made.
            like: the model's tensor whose place it takes: tokens and width may differ.
            what: for the error.

        Returns:
            It in the leading axes of `like`.

        Raises:
            EditError: where its sequences or heads do not fit.
        """
        if self.swapped:
            tensor = tensor.transpose(0, 1)
        lead = tuple(like.shape[:-2])
        count = 1
        for size in lead:
            count *= size
        if tensor.ndim != 4 or tensor.shape[0] * tensor.shape[1] != count:
            raise EditError(f"the new {what} is {tuple(tensor.shape)}, and {tuple(self.fold(like).shape)} is needed.")
        return tensor.reshape(*lead, *tensor.shape[-2:])

    def fold_mask(self, mask: Tensor) -> Tensor:
        """A mask in four dimensions that broadcast."""
        if mask.ndim <= 2:
            return mask[(None,) * (4 - mask.ndim)]
        if len(self.lead) > 1 and mask.ndim <= 4:
            mask = mask[(None,) * (4 - mask.ndim)]
            return mask.transpose(0, 1) if self.swapped else mask
        lead = mask.shape[:-2]
        if all(size == 1 for size in lead):
            return mask.reshape(1, 1, *mask.shape[-2:])
        return mask.expand(*self.lead, *mask.shape[-2:]).reshape(self.batch, self.heads, *mask.shape[-2:])

    def unfold_mask(self, mask: Tensor) -> Tensor:
        """A mask of four dimensions as the kernel takes it."""
        if self.swapped:
            return mask.transpose(0, 1)
        if len(self.lead) == 2:
            return mask
        last = mask.shape[-2:]
        return mask.expand(self.batch, self.heads, *last).reshape(*self.lead, *last)
