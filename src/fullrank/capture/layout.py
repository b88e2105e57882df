"""Which axes of a stream hold sequences, tokens and features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["PLAIN", "Axes", "Layout"]

Axes = Literal["tokens", "channels last", "channels first", "samples", "unknown"]
"""`tokens`: (sequences, tokens, width) or the two first exchanged, or (tokens, width) of one sequence. `channels last`
and `channels first`: a grid of tokens. `samples`: whatever comes after the first axis is one vector of one sample.
`unknown`: of four dimensions, and it could not be told."""


@dataclass(frozen=True)
class Layout:
    """How a model lays out the stream of a stack.

    Attributes:
        axes: what the axes hold.
        tokens_first: whether a stream of three dimensions is (tokens, sequences, width).
    """

    axes: Axes = "tokens"
    tokens_first: bool = False

    def tokens(self, state: Tensor) -> Tensor | None:
        """A state as (sequences, tokens, width); samples as the tokens of one sequence.

        Returns:
            A view where it can be one; None where it is not known which axis holds the tokens.
        """
        if self.axes == "samples":
            return state.flatten(1).unsqueeze(0)  # all features of a sample are its width
        if state.ndim == 2:
            return state.unsqueeze(0)
        if state.ndim == 3:
            return state.transpose(0, 1) if self.tokens_first else state
        if state.ndim == 4 and self.axes == "channels first":
            return state.flatten(2).mT
        return state.flatten(1, 2) if state.ndim == 4 and self.axes == "channels last" else None

    def back(self, X: Tensor, like: Tensor) -> Tensor:
        """What `tokens` makes X of, in the layout of `like`."""
        if like.ndim == 3 and self.axes != "samples" and self.tokens_first:
            return X.transpose(0, 1)
        if like.ndim == 4 and self.axes == "channels first":
            return X.mT.reshape(like.shape)
        return X.reshape(like.shape)

    def sizes(self, stream: torch.Size) -> tuple[int, int, int]:
        """(sequences, tokens, width) of a stream of two (one sequence), three or four dimensions."""
        if len(stream) == 2:
            return 1, *stream
        if len(stream) == 3:
            return (stream[1], stream[0], stream[2]) if self.tokens_first else tuple(stream)  # type: ignore[return-value]
        if self.axes == "channels first":
            return stream[0], stream[2:].numel(), stream[1]
        return stream[0], stream[1:-1].numel(), stream[-1]


PLAIN: Final = Layout()
"""(sequences, tokens, width)."""
