"""A linear map from states to classes, for models that have no head of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Readout"]


class Readout(nn.Module):
    """W x with W drawn from a seed, of variance 1/width: the same for every variant.

    Args:
        width: of the states.
        classes: how many.
        seed: of W.
        like: whose device and dtype W gets.
    """

    def __init__(self, width: int, classes: int, seed: int, like: Tensor) -> None:
        super().__init__()
        self.seed = seed
        self.weight = nn.Parameter(torch.empty((classes, width), device=like.device, dtype=like.dtype))
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Back to the first weights, whatever was trained since."""
        drawn = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(self.seed))
        self.weight.copy_(drawn / self.weight.shape[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to (…, classes)."""
        return x @ self.weight.T
