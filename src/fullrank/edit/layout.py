"""Bringing the tensors of a kernel call into (batch, heads, tokens, width), and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fullrank.capture.reading import Unreadable, exchanged, fold, fold_mask, sequences_and_heads
from fullrank.errors import EditError

__all__ = ["KernelLayout"]


@dataclass(frozen=True)
class KernelLayout:
    """How a model lays out the leading axes of its queries, or of its maps.

    Attributes:
        lead: the axes before the last two.
        batch: what they hold of sequences (or windows).
        heads: what they hold of heads.
        exchange: which two of them change places for (sequences, …, heads); None where they are in that order.
    """

    lead: tuple[int, ...]
    batch: int
    heads: int
    exchange: tuple[int, int] | None = None

    @classmethod
    def of(cls, rows: Tensor, batch: int | None, heads: int | None, path: str) -> KernelLayout:
        """Read the leading axes.

        Args:
            rows: queries or a map.
            batch: sequences in what the module was called with.
            heads: that the module states.
            path: of the module, for the error.

        Returns:
            The layout.

        Raises:
            EditError: where sequences and heads cannot be told apart, or an axis comes between the heads and the rows.
        """
        try:
            exchange = exchanged(rows, batch, heads)
            ordered = rows if exchange is None else rows.transpose(*exchange)
            sizes = sequences_and_heads(ordered, batch, heads)
        except Unreadable as reason:
            raise EditError(f"attention in {path} cannot be edited: {reason}.") from None
        if ordered.ndim > 4 and heads not in (None, sizes[1]):
            raise EditError(
                f"attention in {path} cannot be edited: the last of its leading axes {tuple(ordered.shape[:-2])} is "
                f"not that of its {heads} heads."
            )
        return cls(tuple(rows.shape[:-2]), *sizes, exchange)

    def fold(self, tensor: Tensor) -> Tensor:
        """A tensor of queries, keys, values or outputs in four dimensions; its heads may be fewer."""
        if self.exchange is not None:
            if tensor.ndim - 2 < len(self.lead):
                tensor = tensor.reshape(*self.lead, *tensor.shape[-2:])
            tensor = tensor.transpose(*self.exchange)
        return fold(tensor, self.batch)

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
        if tensor.ndim != 4 or tensor.shape[:2].numel() != like.shape[:-2].numel():
            raise EditError(f"the new {what} is {tuple(tensor.shape)}, and {tuple(self.fold(like).shape)} is needed.")
        if self.exchange is not None:
            lead = like.shape[:-2] if like.ndim - 2 == len(self.lead) else self.lead
            tensor = self._exchanged(tensor, tuple(lead))
        return tensor.reshape(*like.shape[:-2], *tensor.shape[-2:])

    def fold_mask(self, mask: Tensor) -> Tensor:
        """A mask in four dimensions that broadcast."""
        if self.exchange is not None and mask.ndim > 2:
            mask = mask[(None,) * (len(self.lead) + 2 - mask.ndim)].transpose(*self.exchange)
        mask = fold_mask(mask, self._ordered(self.lead), self.batch, self.heads)
        return mask[(None,) * (4 - mask.ndim)]

    def unfold_mask(self, mask: Tensor) -> Tensor:
        """A mask of four dimensions as the kernel takes it."""
        mask = mask[(None,) * (4 - mask.ndim)]
        if len(self.lead) == 2:
            return mask if self.exchange is None else mask.transpose(*self.exchange)
        mask = mask.expand(self.batch, self.heads, *mask.shape[-2:])
        if self.exchange is not None:
            mask = self._exchanged(mask, self.lead)
        return mask.reshape(*self.lead, *mask.shape[-2:])

    def _ordered(self, lead: tuple[int, ...]) -> tuple[int, ...]:
        """The model's leading axes as (sequences, …, heads), or these as the model's: it is the same exchange."""
        if self.exchange is None:
            return lead
        ordered = list(lead)
        one, other = self.exchange
        ordered[one], ordered[other] = ordered[other], ordered[one]
        return tuple(ordered)

    def _exchanged(self, tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
        """From (batch, heads, tokens, width) to the model's leading axes, where two of them change places."""
        assert self.exchange is not None
        return tensor.reshape(*self._ordered(lead), *tensor.shape[-2:]).transpose(*self.exchange)
